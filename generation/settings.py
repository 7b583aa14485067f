"""What may be asked for each prompt on its own."""

from dataclasses import dataclass
from typing import Annotated

from utils import Count, Seed

from annotated_types import Ge, Le

from generation.sampling import Sampling


@dataclass(frozen=True)
class Settings(Sampling):
    """How a text is written. Each of these may also stand in a line of --prompt_file."""

    max_new_tokens: Count = 300
    """Stop after this many tokens, if the text has not ended before. Alias: --max_length."""
    stop: tuple[str, ...] = ()
    """Also stop before any of these texts."""
    seed: Seed | None = None
    """Same seed, same text. Default: a random one, which is printed; 0 with --output."""
    num_samples: Count = 1
    """Texts for each prompt; text number i depends on (seed, number of the prompt, i) alone."""
    best_of: Count | None = None
    """Write so many texts, and keep the num_samples whose tokens the model finds most probable on average."""
    beams: Count | None = None
    """Search for the most probable texts instead of drawing one, with so many at once; num_samples of them are kept."""
    length_penalty: Annotated[float, Ge(-100), Le(100)] = 1.0
    """With --beams: a text's log-probability is divided by its length to this power; larger values prefer longer texts."""

    def problems(self) -> list[str]:
        problems = []
        if self.beams is not None and self.best_of is not None:
            problems.append("beams and best_of are two ways to choose a text; give one of them")
        for name in ("beams", "best_of"):
            number = getattr(self, name)
            if number is not None and number < self.num_samples:
                problems.append(f"num_samples={self.num_samples} texts can't be kept of {name}={number}")
        if self.best_of is not None and self.best_of > 1 and self.greedy:
            problems.append("best_of draws several texts, and at temperature 0 they are all the same; raise temperature, or try beams")
        return problems

    def unused(self) -> list[str]:
        """Sentences on options that have no effect beside the others."""
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.beams is not None:
            return [f"beams don't draw: {', '.join(filters)} have no effect"] if filters else []
        sentences = []
        if self.greedy and (filters or self.num_samples > 1):
            names = ", ".join([*filters, *["num_samples"] * (self.num_samples > 1)])
            sentences.append(f"at temperature 0 the text is always the same: {names} have no effect on it")
        if self.length_penalty != 1:
            sentences.append("length_penalty is an option of beams: it has no effect")
        return sentences
