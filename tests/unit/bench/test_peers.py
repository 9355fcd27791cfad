"""TRL's trainers do the same work as ours on the same group: same tokens, same loss, same gradients."""

from __future__ import annotations

import pytest
import torch

from tests.bench import peers, peers_own, peers_trl
from tests.bench.harness import ROOT, Skip
from tests.bench.peers_groups import QWEN3, SHAPES, Shape, flop_ratio, make_step

SMALL = Shape(
    4, 24, model=(("vocab_size", 512), ("initializer_range", 0.1), ("max_position_embeddings", 1024))
)  # fmt: skip


def test_a_shape_makes_the_same_group_every_time():
    one, other = (make_step(SMALL).groups[0] for _ in range(2))
    assert one.prompt_tokens.tolist() == other.prompt_tokens.tolist()
    assert one.group.completion_tokens.tolist() == other.group.completion_tokens.tolist()
    assert one.group.completion_lengths.tolist() == SMALL.lengths()


def test_completions_share_their_prompt_and_no_more():
    group = make_step(SHAPES[-1]).groups[0].group
    firsts = group.completion_tokens[group.completion_lengths.cumsum() - group.completion_lengths]
    assert len(set(firsts.tolist())) == 64


def test_the_operations_saved_are_at_most_the_tokens_saved():
    """With neither head nor attention, what is saved is the share of tokens that are not forwarded."""
    shape = Shape(16, 512, model=tuple((QWEN3 | {"vocab_size": 0, "head_dim": 0}).items()))
    own = sum(shape.lengths()) - 16
    assert flop_ratio(shape) == pytest.approx((16 * 512 + own) / (512 + own))
    assert 1 < flop_ratio(Shape(16, 512)) < flop_ratio(shape)


def test_a_missing_or_another_trl_skips_the_rows_and_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers_trl.importlib.util, "find_spec", lambda name: None if name == "datasets" else object())
    with pytest.raises(Skip, match=r"datasets not installed: pip install -c constraints.txt -e '.\[peers\]'"):
        peers_trl.check_installed()
    monkeypatch.setattr(peers_trl.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers_trl.importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(Skip, match=r"trl 1.17.0 is installed, and 1.16.0 wanted"):
        peers_trl.check_installed()


def test_the_version_shimmed_is_the_version_pinned():
    for file in ("pyproject.toml", "constraints.txt"):
        assert f"trl=={peers_trl.VERSION}" in (ROOT / file).read_text()


def test_every_claim_of_the_learner_is_a_row():
    names = {row.name for row in peers.ROWS}
    assert len(names) == len(peers.ROWS)
    assert {row.contest for row in peers.ROWS} == {"step_16_64", "step_16_512", "step_64_64", "step_64_512"}
    for peer in peers.PEERS.values():
        assert peer.batches.keys() == peer.speed.keys()
        assert set(peer.batches.values()) <= {4, 8, 16, 32}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
class TestSameWork:
    """Gradients of one step. The peers' fused heads are in, and the shims that the benchmark uses."""

    @pytest.fixture(autouse=True)
    def needs_trl(self, monkeypatch):
        for name, value in peers_trl.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        try:
            peers_trl.check_installed()
        except Skip as skip:
            pytest.skip(str(skip))
        import trl.trainer.utils
        from trl.experimental.async_grpo import async_grpo_trainer, packing

        for module, name in (
            (trl.trainer.utils, "_use_triton"),
            (trl.trainer.utils, "_ChunkedLogProbFunction"),
            (packing, "tree_attention"),
            (async_grpo_trainer, "get_peak_flops_per_device"),
        ):
            monkeypatch.setattr(module, name, getattr(module, name))  # the shims go when the test is over

    @pytest.mark.parametrize("compact_head", [False, True])
    def test_grpo_trainer(self, tmp_path, compact_head):
        # Its ratio is against the policy itself: it takes no logprobs but those of vLLM.
        ours = own_step(anchor="proximal", importance_sampling_mode="none")
        theirs = peer_step(
            peers_trl.grpo_trainer(tmp_path, SMALL, device_batch=2, compact_head=compact_head, max_grad_norm=0)
        )
        check_same(ours, theirs)

    @pytest.mark.parametrize("own_head", [False, True])
    def test_async_grpo_trainer(self, tmp_path, own_head):
        # One micro-batch: it averages over those, each by its own tokens.
        ours = own_step()
        theirs = peer_step(peers_trl.async_trainer(tmp_path, SMALL, device_batch=4, own_head=own_head, max_grad_norm=0))
        check_same(ours, theirs)


def own_step(**options):
    trainer = peers_own.make_trainer(SMALL, **options)
    result = trainer.forward_backward(make_step(SMALL))
    return {name: parameter.grad for name, parameter in trainer._parameters.items()}, result.metrics["loss"]


def peer_step(trainer):
    """Gradients and loss of the first step."""
    from transformers import TrainerCallback

    gradients, losses = {}, []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            if not gradients:
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    compute_loss = trainer.compute_loss

    def remember(*arguments, **options):
        loss = compute_loss(*arguments, **options)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = remember
    trainer.add_callback(Look())
    trainer.train()
    return gradients, sum(losses[: len(losses) // peers_trl.NUM_STEPS])


def check_same(ours, theirs):
    (own_gradients, own_loss), (gradients, loss) = ours, theirs
    assert loss == pytest.approx(own_loss, abs=1e-5)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * torch.linalg.vector_norm(gradient) + 1e-7, name
