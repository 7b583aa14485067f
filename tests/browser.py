"""A real browser for the tests of the page that export_model.py writes. Run alone, it tells how fast pages write:

python tests/browser.py checkpoints/nano/best_model.html
"""

import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
FLAGS += " --disable-sync --disable-dev-shm-usage --window-size=1280,900"


def why_no_browser() -> str | None:
    """Why there is no browser for tests; None where there is."""
    if not find_spec("selenium"):
        return "selenium is not installed"
    return None if CHROMIUM and DRIVER else "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"


class Browser:
    """One session of Chromium, in which every page is a file. profile: an empty folder for what it keeps."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(300)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # what the browser's own first page asked for

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def open(self, path: Path) -> None:
        """Show a page, unless it is there already, and wait for its model."""
        if self.driver.current_url != path.as_uri():
            self.driver.get(path.as_uri())
            self.ask("ready")

    def ask(self, call: str, *args):
        """The value of the page's `model.<call>`, which is a promise; it sees the arguments as `args`."""
        script = f"""const [...args] = arguments, done = args.pop();
            Promise.resolve(model.{call}).then((value) => done({{ value }}), (error) => done({{ error: String(error) }}));"""
        answer = self.driver.execute_async_script(script, *args)
        assert "error" not in answer, answer
        return answer["value"]

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def idle(self, form: str) -> bool:
        return self.find(f"#{form} .stop").get_attribute("aria-disabled") == "true"

    def generate(self, **values) -> None:
        """Fill the form and press Generate."""
        for name, value in values.items():
            self.driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))
        self.find("#write .main").click()


def main(names: list[str]) -> None:
    """Tokens per second of 200 tokens behind an empty prompt, five times for each page, in turn."""
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        print(browser.driver.capabilities["browserVersion"])
        for _ in range(5):
            for name in names:
                browser.open(Path(name).resolve())
                runs = [browser.ask("generate('', { max_new_tokens: 200, seed: args[0] })", seed) for seed in (1, 2)]
                tokens, seconds = (sum(run[key] for run in runs) for key in ("tokens", "seconds"))
                print(f"{name}: {tokens / seconds:.0f} tokens/s ({tokens} tokens)")


if __name__ == "__main__":
    main(sys.argv[1:])
