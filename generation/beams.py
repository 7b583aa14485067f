"""Beam search: of all texts, an approximation to those that are most probable as a whole."""

import copy
from collections.abc import Callable
from dataclasses import replace

from generation.writing import Row, Writer


def beam_search(
    writer: Writer, prompt: Row, beams: int, length_penalty: float, stopped: Callable[[Row], bool] = lambda row: False
) -> list[tuple[float, Row]]:
    """The best texts found behind a prompt, with their scores, at most `beams`, the best first.

    A score is the sum of log-probabilities / (number of drawn tokens) ** length_penalty: above 0 longer texts are preferred, below 0
    shorter ones. Penalties for repetition apply to the log-probabilities, filters and temperature don't. `stopped` tells rows that end
    before their EOT or limit. As in transformers (early_stopping=False): of the 2 x beams best continuations at each step, those among
    the best `beams` that end are kept; the search ends when as many are kept and the best that goes on, at its present length, scores no
    higher than the worst of them.
    """
    greedy = replace(writer.sampling, temperature=0.0)
    going, found = [(0.0, prompt)], []
    while going:
        rows = [row for _, row in going]
        logits = writer.reader.read([row.ids for row in rows])[:, -1]
        scores = writer.scores(logits.log_softmax(dim=-1), rows, greedy)
        scores = scores + scores.new_tensor([score for score, _ in going])[:, None]
        best, at = scores.flatten().topk(min(2 * beams, scores.numel()))
        parents, further = [], []
        for rank, (score, place) in enumerate(zip(best.tolist(), at.tolist(), strict=True)):
            parent, token = divmod(place, scores.size(1))
            row = copy.copy(rows[parent])
            row.ids, row.log_probabilities, row.top = row.ids.copy(), row.log_probabilities.copy(), row.top.copy()
            writer.append(row, token, logits[parent])
            if row.finish is None and stopped(row):
                row.finish = "stop"
            if row.finish is None and len(further) < beams:
                parents.append(parent)
                further.append((score, row))
            elif row.finish is not None and rank < beams:
                found.append((score / row.number**length_penalty, row))
        found = sorted(found, key=lambda pair: pair[0], reverse=True)[:beams]
        going = further
        if going and len(found) == beams and going[0][0] / going[0][1].number ** length_penalty <= found[-1][0]:
            break
        if going:
            writer.reader.select(parents)
    return found
