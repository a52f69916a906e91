"""A step recorded once and replayed: the same training, with other numbers each time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_adapters import UNET
from test_compiling import batch_of
from test_training import assert_same_bits, train_until
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskdm.diffusion.schedule import make_schedule
from maskdm.models.build import build_model
from maskdm.models.compiling import CompiledForward
from maskdm.recipe import Recipe
from maskdm.training import ready, update
from maskdm.training.ema import Averages
from maskdm.training.optim import make_optimizer
from maskdm.training.ready import Ready
from maskdm.training.trainer import train
from maskdm.training.update import Update


class Light(CompiledForward):
    """Compiled in no time."""

    def __init__(self, model):
        super().__init__(model, "aot_eager")


class Uncompiled(CompiledForward):
    """Runs eagerly, since the compiler does not go with a `Tape`."""

    def compile(self, shape, attempt):
        return 0.0


@pytest.fixture
def modern(changed) -> Recipe:
    """The tiny recipe with Muon and power averages."""
    more = {"optimizer": "muon", "ema": {"kind": "power", "width": 0.1}}
    stages = [{**stage, **more} for stage in changed().model_dump()["stages"]]
    return changed(stages=stages, compile="off", checkpoint_every=4)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations on these very tensors, without any Python."""

    def __init__(self):
        super().__init__()
        self._operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._operations.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self._operations:
            inputs = {
                one.untyped_storage().data_ptr()
                for one in tree_leaves((args, kwargs))
                if isinstance(one, torch.Tensor)
            }
            pairs = zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True)
            for known, new in pairs:
                # Not the views, and what was changed in place.
                if isinstance(known, torch.Tensor):
                    if known.untyped_storage().data_ptr() not in inputs:
                        known.copy_(new)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Records as on a GPU, and counts how often."""
    done = {"recorded": 0, "replayed": 0}

    def recorded(work, groups):
        for _ in range(update.WARM_UPS):
            work()
        with Tape() as tape:
            work()
        done["recorded"] += 1

        def replay():
            done["replayed"] += 1
            tape.replay()

        return replay

    monkeypatch.setattr(update, "recorded", recorded)
    monkeypatch.setattr(ready, "_why_no_graph", lambda *_: None)
    monkeypatch.setattr("maskdm.training.trainer.CompiledForward", Uncompiled)
    return done


def assert_alike(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """The last checkpoints of two runs hold the same weights, averages and moments."""
    last = sorted(path.name for path in (one / "checkpoints").iterdir())[-1]
    for name in ("model", "ema", "ema-narrow", "optimizer"):
        file = Path("checkpoints") / last / f"{name}.safetensors"
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            tensors, others = load_file(one / file), load_file(other / file)
            assert tensors.keys() == others.keys()
            for key, value in tensors.items():
                torch.testing.assert_close(others[key], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_replayed_steps_train_as_eager_ones(which, request, tmp_path, as_on_a_gpu, capsys):
    recipe = request.getfixturevalue(which)
    train(recipe.model_copy(update={"compile": "off"}), tmp_path / "eager")
    assert as_on_a_gpu == {"recorded": 0, "replayed": 0}
    train(recipe.model_copy(update={"compile": "graphs"}), tmp_path / "replayed")
    assert as_on_a_gpu == {"recorded": 2, "replayed": 11}
    assert capsys.readouterr().out.count("each step is replayed as one CUDA graph") == 2
    assert_alike(tmp_path / "eager", tmp_path / "replayed")


def test_a_replayed_run_that_was_killed_goes_on_bit_for_bit(modern, tmp_path, as_on_a_gpu):
    recipe = modern.model_copy(update={"compile": "graphs"})
    train(recipe, tmp_path / "whole", show=False)
    train_until(recipe, tmp_path / "parts", 4)
    train(recipe, tmp_path / "parts", show=False)
    assert as_on_a_gpu["recorded"] == 2 + 1 + 2
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def parts_of(recipe: Recipe) -> tuple:
    """What a run of it would update."""
    model, accelerator, stage = build_model(recipe), Accelerator(cpu=True), recipe.stages[0]
    averages, optimizer = Averages(model), make_optimizer(model, stage)
    averages.enter_stage(stage, model, begins=True)
    return accelerator, model, *accelerator.prepare(model, optimizer), averages


def test_a_graph_finds_all_that_it_was_recorded_with(modern, monkeypatch):
    """It knows tensors by their addresses, so none may be freed."""
    monkeypatch.setattr(update, "recorded", lambda work, groups: lambda: None)
    stage = modern.stages[1]  # whole images: their patches' places are one expanded row
    one = Update(*parts_of(modern), stage, Ready(modern.diffusion, make_schedule("cosine"), None))
    example = batch_of(modern, stage)
    kept = [weakref.ref(part) for part in vars(example).values() if part is not None]
    one.record(example)
    del example
    gc.collect()
    assert len(kept) == 4 and all(one() is not None for one in kept)


@pytest.mark.parametrize("begun", [False, True])
def test_recording_changes_nothing(modern, as_on_a_gpu, begun):
    stage, parts = modern.stages[0], parts_of(modern)
    _, model, _, stepper, averages = parts
    optimizer = stepper.optimizer
    one = Update(*parts, stage, Ready(modern.diffusion, make_schedule("cosine"), None))
    if begun:
        for step in range(2):
            one(batch_of(modern, stage, step), step)

    def tensors() -> dict[str, torch.Tensor]:
        networks = {"model": model, "main": averages.main, "narrow": averages.narrow}
        found = {f"{n} {k}": v for n, m in networks.items() for k, v in m.state_dict().items()}
        for number, values in enumerate(optimizer.state.values()):
            found |= {f"{number} {key}": value for key, value in values.items()}
        return {key: value.clone() for key, value in found.items()}

    before = tensors()
    one.record(batch_of(modern, stage, 7))
    for key, value in tensors().items():
        assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    for average in (averages.main, averages.narrow):
        for parameter in average.parameters():
            assert parameter.grad_fn is None and not parameter.requires_grad
    answer = one(batch_of(modern, stage, 3), 3)
    assert answer.isfinite().all() and any(
        not torch.equal(value, before[key]) for key, value in tensors().items() if key in before
    )


def test_what_cannot_be_recorded_is_done_eagerly(tiny, tmp_path, as_on_a_gpu, monkeypatch, capsys):
    def broken(work, groups):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(update, "recorded", broken)
    train(tiny.model_copy(update={"compile": "graphs"}), tmp_path / "noted")
    told = capsys.readouterr().out
    assert told.count("no CUDA graph: operation not permitted") == 2
    train(tiny.model_copy(update={"compile": "on"}), tmp_path / "compiled")
    assert_same_bits(tmp_path / "noted", tmp_path / "compiled")


def test_small_steps_are_replayed_by_themselves(tiny, tmp_path, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(ready, "wants_compiling", lambda *_: True)
    train(tiny.model_copy(update={"compile": "auto"}), tmp_path / "auto", show=False)
    assert as_on_a_gpu["recorded"] == 2
    train(tiny.model_copy(update={"compile": "on"}), tmp_path / "on", show=False)
    monkeypatch.setattr(ready, "LAUNCH_BOUND", 1.0)
    train(tiny.model_copy(update={"compile": "auto"}), tmp_path / "large", show=False)
    assert as_on_a_gpu["recorded"] == 2


def test_without_a_gpu_there_is_no_graph(changed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("maskdm.training.trainer.CompiledForward", Light)
    train(changed(compile="graphs"), tmp_path / "run")
    told = capsys.readouterr().out
    assert told.count("note: no CUDA graph, since the device is cpu") == 2  # stages
    assert told.count("compiled in") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_run_with_cuda_graphs_ends_like_an_eager_one(modern, tmp_path, capsys, micro_batch_size):
    stages = [
        {**stage, "steps": 20, "micro_batch_size": micro_batch_size}
        for stage in modern.model_dump()["stages"]
    ]
    recipes = {
        way: Recipe(**{**modern.model_dump(), "stages": stages, "compile": way})
        for way in ("off", "auto")
    }
    for way, recipe in recipes.items():
        train(recipe, tmp_path / way)
    assert capsys.readouterr().out.count("each step is replayed as one CUDA graph") == 2
    assert_alike(tmp_path / "off", tmp_path / "auto", rtol=1e-2, atol=3e-3)
    train_until(recipes["auto"], tmp_path / "parts", 8)
    train(recipes["auto"], tmp_path / "parts", show=False)
    assert_alike(tmp_path / "auto", tmp_path / "parts", rtol=1e-2, atol=3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "vit"},
        {"kind": "dit", "depth": 2},
        {"kind": "unet2d", "options": UNET},
        {"num_classes": 10},
    ],
)
def test_other_networks_are_recorded(tiny, tmp_path, capsys, changes):
    sizes = {"patch_size": 2}
    if changes.get("kind") != "unet2d":
        sizes |= {"embed_dim": 16, "depth": 3, "num_heads": 2}
    stages = [{**stage, "steps": 5} for stage in tiny.model_dump()["stages"]]
    settings = {"model": {**sizes, **changes}, "stages": stages}
    for way in ("off", "graphs"):
        recipe = Recipe(**{**tiny.model_dump(), **settings, "compile": way})
        train(recipe, tmp_path / way)
    assert capsys.readouterr().out.count("each step is replayed as one CUDA graph") == 2
    assert_alike(tmp_path / "off", tmp_path / "graphs", rtol=1e-2, atol=3e-3)
