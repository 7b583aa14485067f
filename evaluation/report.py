"""What evaluate.py prints."""

from utils import notice

LEAK_STANDARD_ERRORS = 4


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def between(interval: list[float] | None) -> str:
    return "-" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def print_results(results: dict[str, dict[str, dict]]) -> bool:
    """Print the results; say where bits per byte are missing and why, and where a model is better than a perfect one. True if none is."""
    honest, notes, width = True, [], max(map(len, results))
    header = f"{'loss':>8} {'perplexity':>10} {'accuracy':>8} {'top 5':>6} {'bits/byte':>9} {'95% interval':>16} {'perfect':>8}"
    print(f"{'data':{width}}  split  {header} {'tokens':>12} {'documents':>9}")
    for name, split, r in ((name, split, r) for name, splits in results.items() for split, r in splits.items()):
        line = f"{r['loss']:8.4f} {r['perplexity']:10.3f} {r['accuracy']:8.4f} {r['top5_accuracy']:6.3f} {number(r['bits_per_byte'], 4):>9}"
        line += f" {between(r.get('bits_per_byte_interval')):>16} {number(r.get('entropy_bits_per_byte'), 4):>8}"
        print(f"{name:{width}}  {split:5}  {line} {r['tokens']:12,} {r['documents']:9,}")
        if "bits_per_byte_reason" in r:
            notes.append(f"{name} {split}: no bits per byte, {r['bits_per_byte_reason']}")
        elif r["bits_per_byte_interval"] is None:
            notes.append(f"{name} {split}: no interval, there are too few documents to tell how much they vary")
        above, error = r.get("above_entropy_bits_per_story"), r.get("above_entropy_standard_error")
        if error is not None and above < -LEAK_STANDARD_ERRORS * error:
            wrong = f"{-above:.3f} bits a story below a perfect model (standard error {error:.3f})"
            notes.append(f"error: {name} {split}: {wrong}: the model has seen these stories, or something is wrong")
            honest = False
    print("The intervals cover the luck of these documents, not that of the training: for that train several seeds.")
    for note in notes:
        notice(note)
    return honest


def print_positions(results: dict[str, dict[str, dict]]) -> None:
    for name, split, r in ((name, split, r) for name, splits in results.items() for split, r in splits.items()):
        print(f"\n{name} {split}: loss by position in the context\n{'position':>11} {'loss':>8} {'tokens':>12}")
        for row in r["loss_by_position"]:
            print(f"{row['from']:5}-{row['to']:<5} {row['loss']:8.4f} {row['tokens']:12,}")


def print_samples(r: dict) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}%"

    print(f"samples: {r['texts']} texts, {r['tokens']:.0f} tokens ({r['bytes']:.0f} bytes) on average")
    print(f"  end by themselves          {percent(r['ended'])}")
    print(f"  differ from each other     {percent(r['different'])}")
    print("  distinct 1-, 2-, 3-grams   " + ", ".join(map(percent, r["distinct"].values())))
    print(f"  4-grams repeated in a text {percent(r['repeated'])}")
    for n, shares in r.get("in_training", {}).items():
        real = f"(held-out texts: {percent(shares['held_out'])})"
        print(f"  {n:>2} tokens in a row also stand in the training data: {percent(shares['samples'])} {real}")
    if "judge" in r:
        print(f"  perplexity by the judge    {r['judge']['perplexity']:.3f}, {number(r['judge']['bits_per_byte'], 4)} bits/byte")
        if "bits_per_byte_reason" in r["judge"]:
            notice(f"no bits per byte by the judge, {r['judge']['bits_per_byte_reason']}")
    if "grammar" in r:
        bits = number(r["grammar"]["bits_per_story"], 1)
        print(f"  could be the grammar's     {percent(r['grammar']['share'])}, {bits} bits a story under it")
