"""One compiled graph a stage: no breaks, no recompilation, the same numbers, and no lost run."""

from __future__ import annotations

import copy
import pickle
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from maskdm.diffusion.schedule import make_schedule
from maskdm.models.build import Backbone, build_model
from maskdm.models.compiling import CompiledForward, NotCompiled, wants_compiling
from maskdm.models.uvit import UViT
from maskdm.recipe import Recipe, Stage
from maskdm.runs.lines import read_lines
from maskdm.training.ema import make_average, update_average
from maskdm.training.optim import make_optimizer
from maskdm.training.ready import forward_and_backward
from maskdm.training.step import Batch, backward, draw_batch
from maskdm.training.trainer import train


def batch_of(recipe: Recipe, stage: Stage, step: int = 0, num: int | None = None) -> Batch:
    """Random images, hidden, noised: what the network is given in a step."""
    generator = torch.Generator().manual_seed(step)
    shape = (num or stage.batch_size, *recipe.data.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % 3 if recipe.model.num_classes else None
    return draw_batch(images, labels, recipe, stage, make_schedule("cosine"), step)


def compile_for(forward: CompiledForward, model: Backbone, batch: Batch) -> None:
    """Compiles as a stage does."""
    forward.compile(batch.x0.shape, partial(forward_and_backward, model, batch))


@pytest.mark.parametrize(
    ("num_classes", "checkpointing", "precision"), [(0, False, "no"), (3, True, "bf16")]
)
def test_a_stage_is_one_graph_and_is_compiled_once(changed, num_classes, checkpointing, precision):
    recipe = changed(model={**changed().model.model_dump(), "num_classes": num_classes})
    model = build_model(recipe)
    if checkpointing:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    counter = CompileCounterWithBackend("aot_eager")
    forward = CompiledForward(model, counter)
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    wrapped = accelerator.prepare(model)
    for number, stage in enumerate(recipe.stages, 1):
        compile_for(forward, model, batch_of(recipe, stage))
        for step in range(3):
            batch = batch_of(recipe, stage, step)
            backward(accelerator, wrapped, batch, make_schedule("cosine"), recipe.diffusion, None)
        assert counter.frame_count == number  # whole, and not again within the stage
    AcceleratorState._reset_state()


def test_the_compiled_step_is_the_eager_step(tiny):
    gradients = []
    for compiled in (False, True):
        model = build_model(tiny)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        forward = CompiledForward(model, "aot_eager")
        if compiled:
            compile_for(forward, model, batch_of(tiny, tiny.stages[0]))
            assert all(parameter.grad is None for parameter in model.parameters())
        batch = batch_of(tiny, tiny.stages[0], step=5)
        schedule = make_schedule("cosine")
        backward(Accelerator(cpu=True), model, batch, schedule, tiny.diffusion, None)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_compiled_runs_as_written(tiny):
    model = build_model(tiny)
    batch = batch_of(tiny, tiny.stages[0])
    expected = model(batch.x0, batch.visible, batch.t)

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    forward = CompiledForward(model, broken)
    with pytest.raises(NotCompiled, match="no compiler here"):
        compile_for(forward, model, batch)
    assert torch.equal(model(batch.x0, batch.visible, batch.t), expected)


def test_a_graph_break_is_seen(tiny):
    """The test above counts whole graphs only if a break would fail: here one is made."""
    model = build_model(tiny)
    inner = model.head.forward

    def printing(x):
        print(x.mean().item())
        return inner(x)

    model.head.forward = printing
    with pytest.raises(NotCompiled):
        compile_for(CompiledForward(model, "aot_eager"), model, batch_of(tiny, tiny.stages[0]))


def test_another_shape_runs_as_written(tiny):
    model = build_model(tiny)
    counter = CompileCounterWithBackend("aot_eager")
    stage = tiny.stages[0]
    few = batch_of(tiny, stage, num=3)
    expected = model(few.x0, few.visible, few.t)
    forward = CompiledForward(model, counter)
    compile_for(forward, model, batch_of(tiny, stage))
    assert torch.equal(model(few.x0, few.visible, few.t), expected)
    assert counter.frame_count == 1


def test_a_copy_answers_with_its_own_weights(tiny):
    """Of a compiled network: by deepcopy, by pickle, and as a new network with its weights."""
    model = build_model(tiny)
    batch = batch_of(tiny, tiny.stages[0])
    compile_for(CompiledForward(model, "aot_eager"), model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(
            other(batch.x0, batch.visible, batch.t), model(batch.x0, batch.visible, batch.t)
        )
        torch.nn.init.zeros_(other.head.weight)
        torch.nn.init.constant_(other.head.bias, 7)
        assert other(batch.x0, batch.visible, batch.t).eq(7).all()
    assert not model(batch.x0, batch.visible, batch.t).eq(7).any()


def test_more_networks_than_the_compiler_keeps(tiny, changed):
    """Dynamo keeps eight graphs of a class's forward; each of these is another one."""
    for width in range(16, 16 + 10 * 4, 4):
        recipe = changed(model={**tiny.model.model_dump(), "embed_dim": width, "depth": 1})
        model, batch = build_model(recipe), batch_of(recipe, recipe.stages[0])
        expected = model(batch.x0, batch.visible, batch.t)
        forward = CompiledForward(model, "eager")
        compile_for(forward, model, batch)
        torch.testing.assert_close(model(batch.x0, batch.visible, batch.t), expected)


class Syncs(TorchDispatchMode):
    """Counts operations that make the host wait for a device: values and sizes read from it."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.NAMES):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["patch", "block", "crop"])
def test_a_step_reads_nothing_from_the_device(changed, kind):
    recipe = changed(
        data={**changed().data.model_dump(), "flip": True},
        model={**changed().model.model_dump(), "num_classes": 3},
    )
    stage = Stage(**{**recipe.stages[0].model_dump(), "mask": {"kind": kind, "rate": 0.5}})
    model, accelerator = build_model(recipe), Accelerator(cpu=True)
    average, optimizer = make_average(model), make_optimizer(model, stage)
    images = torch.zeros((8, 8, 8, 1), dtype=torch.uint8)
    with Syncs() as syncs:
        schedule, labels = make_schedule("cosine"), torch.zeros(8, dtype=torch.int64)
        batch = draw_batch(images, labels, recipe, stage, schedule, step=1)
        loss = backward(accelerator, model, batch, schedule, recipe.diffusion, 4)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, 0.99)
        assert syncs.seen == []
        loss.item()
    assert len(syncs.seen) == 1  # the count would have noticed


def test_a_compiled_run_ends_like_an_eager_one(changed, tmp_path, monkeypatch):
    recipe = changed(compile="off")
    train(recipe, tmp_path / "eager", show=False)

    class Light(CompiledForward):
        def __init__(self, model):
            super().__init__(model, "aot_eager")

    monkeypatch.setattr("maskdm.training.trainer.CompiledForward", Light)
    train(changed(compile="on"), tmp_path / "compiled", show=False)
    name = Path("checkpoints") / "step-00000011" / "model.safetensors"
    eager, compiled = (load_file(tmp_path / run / name) for run in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_default_compiler_compiles_a_run(changed, tmp_path, capsys):
    recipe = changed(
        model={**changed().model.model_dump(), "depth": 1},
        stages=changed().model_dump()["stages"][:1],
        compile="on",
    )
    train(recipe, tmp_path / "run", show=True)
    assert capsys.readouterr().out.count("compiled in") == 1
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == 6


def test_compiling_is_time_spent_on_the_run(changed, tmp_path, monkeypatch):
    real, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])

    def slow(graph, inputs):
        passed[0] += 1000
        return graph.forward

    class Slow(CompiledForward):
        def __init__(self, model):
            super().__init__(model, slow)

    monkeypatch.setattr("maskdm.training.trainer.CompiledForward", Slow)
    train(changed(compile="on"), tmp_path / "run", show=False)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["elapsed_sec"] > 1000 and lines[-1]["elapsed_sec"] > 2000  # two stages


def test_auto_compiles_on_gpus_only():
    assert wants_compiling("auto", torch.device("cuda"))
    assert not wants_compiling("auto", torch.device("cpu"))
    assert wants_compiling("on", torch.device("cpu"))
    assert not wants_compiling("off", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")  # torch 2.11 asks for it
def test_compiled_and_eager_agree_on_a_gpu():
    torch.manual_seed(0)
    model = UViT(64, 4, 3, 128, depth=5, num_heads=4).cuda()
    patches, t = torch.randn(8, 26, 48).cuda(), torch.rand(8).cuda()
    visible = torch.stack([torch.randperm(256)[:26] for _ in range(8)]).cuda()
    expected = model(patches, visible, t)
    forward = CompiledForward(model)
    compile_for(forward, model, Batch(patches, visible, t, patches, None))
    torch.testing.assert_close(model(patches, visible, t), expected, rtol=1e-2, atol=1e-2)
