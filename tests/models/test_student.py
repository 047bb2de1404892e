"""Students of a TarFlow learn to invert its blocks in one pass; the flow itself stays as it is."""

import functools

import pytest
import torch

from flows import randomized
from jetformer.models.jet import Jet
from jetformer.models.labelled import LabelledFlow
from jetformer.models.student import Student
from jetformer.models.tarflow import TarFlow
from jetformer.objectives import DistillObjective
from jetformer.sampling.flows import check_guidance
from jetformer.sampling.guidance import Guidance
from jetformer.sampling.jacobi import Jacobi

SHAPE = (4, 4, 1)
STUDENT = functools.partial(Student, depth=1, emb_dim=16, num_heads=2)


def flow_of(context_dim=None):
    """A flow that changes little with tokens before, as students start as the identity."""
    flow = TarFlow(
        SHAPE, depth=2, block_depth=1, emb_dim=8, num_heads=2, ps=2, context_dim=context_dim, student=STUDENT
    )
    for name, parameter in flow.named_parameters():
        if "final_proj" in name and "student" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return flow


def batch_of(count, **more):
    return {"image": torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(1)).byte(), **more}


def scored(objective, model, batch):
    keys = torch.arange(2 * len(batch["image"]), dtype=torch.int32).view(-1, 2)
    return objective(model, batch, objective.draw(model, batch, keys, train=True))


def test_a_new_student_is_the_identity():
    flow, z = flow_of(), torch.randn(3, *SHAPE)
    with torch.no_grad():
        x, logdet = flow.inverse(z)
        torch.testing.assert_close(x, z)
        expected = torch.zeros(3)
        tokens, _ = flow.patchify(z)
        for block in flow.blocks:
            expected -= block(tokens)[1]
    torch.testing.assert_close(logdet, expected)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_loss_is_the_error_along_the_flows_path(labelled):
    """Of each student, from the latents on; in grey levels of the pixels. Only students get a gradient."""
    model = LabelledFlow(flow_of, num_labels=3, context_dim=5) if labelled else flow_of()
    randomized(model)
    model.float()
    flow = model.flow if labelled else model
    objective, batch = DistillObjective(dequantize=False), batch_of(4, label=torch.tensor([0, 2, 1, 1]))
    loss, terms = scored(objective, model, batch)
    x = batch["image"] / 127.5 - 1
    context = model.context(batch["label"]) if labelled else None
    path = [flow.patchify(x)[0]]
    for block in flow.blocks:
        path.append(block(path[-1], context)[0])
    last = flow.blocks[1].student(path[2], context)
    first = flow.blocks[0].student(last, context)
    errors = (last - path[1]).square().mean((1, 2)), (first - path[0]).square().mean((1, 2))
    torch.testing.assert_close(terms["student_loss"][0], sum(errors).detach())
    torch.testing.assert_close(terms["student_error"][0], 127.5 * errors[1].sqrt().detach())
    torch.testing.assert_close(loss, sum(errors).mean())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("student" in name), name


def test_students_learn():
    flow, objective, batch = flow_of(), DistillObjective(), batch_of(64)
    before = scored(objective, flow, batch)[1]["student_error"][0].mean()
    assert before > 3
    students = [p for name, p in flow.named_parameters() if "student" in name]
    optimizer = torch.optim.Adam(students, lr=1e-2)
    for _ in range(200):
        loss, terms = scored(objective, flow, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["student_error"][0].mean() < before / 3


def test_what_does_not_fit():
    z = batch_of(1)
    for model in (Jet(SHAPE, depth=1, emb_dim=4, num_heads=1), TarFlow(SHAPE, depth=1, emb_dim=4, num_heads=1)):
        with pytest.raises(ValueError, match=r"TarFlow\.student = @Student"):
            scored(DistillObjective(), model, z)
    with pytest.raises(ValueError, match=r"DistillObjective\.drop_labels_prob"):
        scored(DistillObjective(drop_labels_prob=0.1), flow_of(), z)
    with pytest.raises(ValueError, match=r"DistillObjective\.noise_std is 0"):
        DistillObjective().denoising_std()
    with pytest.raises(ValueError, match="inverse_method and a student"):
        TarFlow(SHAPE, student=STUDENT, inverse_method=Jacobi())
    with pytest.raises(ValueError, match=r"guidance .* students"):
        check_guidance(LabelledFlow(flow_of, num_labels=3), Guidance("interp", 1.0))
