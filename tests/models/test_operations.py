"""Counted operations against PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evatok.models import layers
from evatok.models.attention import Ranges
from evatok.models.operations import count_operations
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer


def attend_span_by_span(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> Tensor:
    """Plain matrix products, which the counter knows."""
    output = torch.empty_like(q)
    for q0, q_count, k0, k_count in ranges.spans:
        query, key, value = (
            x.transpose(0, 1) for x in (q[q0 : q0 + q_count], k[k0 : k0 + k_count], v[k0 : k0 + k_count])
        )
        weights = F.softmax(query @ key.mT * q.shape[-1] ** -0.5, -1)
        output[q0 : q0 + q_count] = (weights @ value).transpose(0, 1)
    return output


@pytest.mark.parametrize("changes", [{}, {"drop_tail": True}, {"causal": False}])
def test_counts_equal_those_of_pytorch_up_to_the_code_projections(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TokenizerConfig(
        size=32,
        choices=(2, 8, 32),
        encoder="tiny",
        decoder="mini",
        latent=16,
        quantizer={"kind": "fsq"},
        align_layer=1,
        **changes,
    )
    model = VideoTokenizer(config).eval()
    rows = [[2, 8, 32, 8], [32, 32, 2, 2]]
    monkeypatch.setattr(layers, "attend", attend_span_by_span)
    counted = count_operations(config, rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = model.encode(torch.rand(2, 3, 16, 32, 32), torch.tensor(rows))
    assert counted.encode == pytest.approx(counter.get_total_flops(), rel=1e-3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode(tokens)
    assert counted.decode == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_papers_mean_of_774_tokens_saves_a_fifth_of_encoding() -> None:
    config = TokenizerConfig()
    uniform = count_operations(config, [[256] * 4])
    adaptive = count_operations(config, [[512, 134, 64, 64]])
    assert uniform.encode / adaptive.encode == pytest.approx(1.3, abs=0.06)
    assert (
        1 < uniform.decode / adaptive.decode < uniform.step / adaptive.step < uniform.encode / adaptive.encode
    )


def test_a_batch_costs_what_its_clips_cost() -> None:
    config = TokenizerConfig()
    rows = [[32, 512, 64, 128], [256, 256, 256, 256]]
    together = count_operations(config, rows)
    alone = [count_operations(config, [row]) for row in rows]
    assert together == (sum(a.encode for a in alone), sum(a.decode for a in alone))
