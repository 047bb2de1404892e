"""Decoding on the device: no wait for it between tokens, and with a graph one launch a token."""

import pytest
import torch

from jetformer.loops.torch_loop import CALLS_BEFORE_CAPTURE, TorchLoop
from jetformer.runtime import Runtime
from jetformer.sampling import decode
from jetformer.sampling import guidance as guidance_lib
from jetformer.sampling.guidance import MODES, Guidance
from small_models import small_model

TOKENS = 64


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize(
    "guidance", [Guidance(), *(Guidance(mode, 2.0) for mode in MODES[1:])], ids=lambda given: given.mode
)
@pytest.mark.parametrize("graphs", [True, False])
def test_tokens(graphs, guidance, autocast, seen, monkeypatch):
    monkeypatch.setenv("JETFORMER_CUDA_GRAPHS", str(int(graphs)))
    loop = TorchLoop(Runtime(torch.device("cuda:0")), autocast_dtype=autocast)
    model = small_model(image_shape=(16, 16, 3), num_mixtures=8).float().eval().cuda()
    text, keys = torch.zeros(4, 1, dtype=torch.int64).cuda(), torch.zeros(4, 2, dtype=torch.int32).cuda()
    tokens = []

    def resolve(draft):  # looks whether a dimension needs rejection sampling, but what it sees means nothing
        if draft.pending is not None:
            bool(draft.pending.any())
        return draft.sample

    monkeypatch.setattr(guidance_lib, "resolve", resolve)

    def on_token():
        tokens.append({name: seen[name] for name in ("waits", "launches", "graph_launches")})
        seen.reset()

    with loop.autocast():
        decode.sample_images(model, text, keys, guidance=guidance, compile=loop.compile, on_token=on_token)
    assert len(tokens) == TOKENS
    looks = 1 if guidance.mode == "density" else 0
    captured = CALLS_BEFORE_CAPTURE + 1 if graphs else None  # waits once
    assert {token["waits"] for number, token in enumerate(tokens[1:], 1) if number != captured} == {looks}
    if graphs:
        assert {token["graph_launches"] for token in tokens[captured:]} == {1}
        assert {token["launches"] for token in tokens[captured + 1 :]} == {2 * looks}
