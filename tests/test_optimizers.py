"""Muon against torch's own, parts of fused matrices, and the learning rate over a run."""

import pytest
import torch

from config import GPTConfig, TrainConfig
from models import GPT
from training.optimizers import Muon, lr_factor, make_optimizers, orthogonalize


def run(optimizer_of, shapes, steps=4):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_of(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        optimizer.step()
    return weights


def test_muon_equals_torch_muon():
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    ours = run(lambda w: Muon(w, lr=0.02, weight_decay=0.1), shapes)
    theirs = run(lambda w: torch.optim.Muon(w, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True), shapes)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # both iterate in bfloat16, ours in batches


def test_muon_treats_the_maps_of_a_fused_matrix_apart():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.zeros(12, 4))
    fused.grad = torch.randn(12, 4)
    parts = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    for part, grad in zip(parts, fused.grad.split(4)):
        part.grad = grad.clone()
    Muon([fused], lr=1.0, weight_decay=0.0, parts={fused: [4, 4, 4]}, dtype=torch.float32).step()
    Muon(parts, lr=1.0, weight_decay=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]))


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 32, 8), (3, 8, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
    assert values.min() > 0.5 and values.max() < 1.3


def test_orthogonalize_leaves_zeros_alone():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4), torch.float32), torch.zeros(1, 4, 4))


def test_every_parameter_moves_under_both_optimizers():
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, arch="qwen3"))
        before = [p.detach().clone() for p in model.parameters()]
        optimizers = make_optimizers(model, TrainConfig(optimizer=name), torch.float32)
        x = torch.randint(32, (2, 9))
        model(x[:, :-1], x[:, 1:])[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters())), name


def test_learning_rate_over_the_run():
    for schedule in ("cosine", "linear"):
        config = TrainConfig(max_steps=100, warmup_steps=10, lr_schedule=schedule, final_lr_fraction=0.1)
        rates = [lr_factor(step, config) for step in range(130)]
        assert 0 < rates[0] < 0.2 and rates[10] == 1.0 and max(rates) == 1.0
        assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a > b for a, b in zip(rates[10:99], rates[11:100]))
        assert rates[99] == pytest.approx(0.1) and rates[129] == pytest.approx(0.1)  # clamped past its end
