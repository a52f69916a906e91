from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskdm.diffusion.schedule import make_schedule
from maskdm.images import feed as feed_module
from maskdm.images.feed import Feed, residence
from maskdm.images.joined import JoinedArrays
from maskdm.images.order import ImageOrder, training_subset
from maskdm.images.store import Store, open_store
from maskdm.recipe import Data
from maskdm.training import tick
from maskdm.training.step import draw_batch, mirror
from maskdm.training.trainer import train

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 60))
def test_the_order_is_a_pure_function_of_the_position(num, seed, position, count):
    order = ImageOrder(num, seed)
    straight = order.indices(0, position + count)[position:]
    assert np.array_equal(ImageOrder(num, seed).indices(position, count), straight)


def test_each_pass_shows_every_image_once_in_another_order():
    passes = ImageOrder(50, seed=3).indices(0, 150).reshape(3, 50)
    assert all(sorted(row) == list(range(50)) for row in passes)
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(passes[0], ImageOrder(50, seed=4).indices(0, 50))


def test_ranks_take_disjoint_shares_that_join_to_the_batch():
    order = ImageOrder(50, seed=3)
    shares = [order.rank_indices(40, 12, rank, 4) for rank in range(4)]
    assert np.array_equal(np.concatenate(shares), order.indices(40, 12))


@pytest.fixture
def store() -> Store:
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 6, 3), dtype=np.uint8)
    return Store(images, np.arange(50) * 7, {})


@pytest.fixture
def feeds():
    """Makes feeds, and closes them."""
    made = []

    def make(store: Store, rank: int = 0, num_ranks: int = 1, data: Data | None = None, **more):
        subset = training_subset(len(store), data or Data())
        order = ImageOrder(len(subset), 3)
        made.append(Feed(store, subset, order, rank, num_ranks, CPU, **more))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


@pytest.mark.parametrize("resident", ["auto", "on", "off"])
@pytest.mark.parametrize("joined", [False, True])
def test_batches_are_a_function_of_the_position_alone(store, feeds, resident, joined):
    if joined:
        pieces = JoinedArrays([store.images[:20], store.images[20:21], store.images[21:]])
        store = Store(pieces, store.labels, {})
    order = ImageOrder(50, 3)
    feed = feeds(store, 1, 2, resident=resident, with_labels=True)
    # In step, then another batch size, back again, and far ahead, as over a resume.
    for position, size in [(0, 8), (8, 8), (16, 8), (24, 20), (44, 20), (0, 8), (999, 6)]:
        images, labels = feed.next(position, size)
        wanted = order.rank_indices(position, size, 1, 2)
        assert np.array_equal(images, store.images[wanted]) and images.dtype == torch.uint8
        assert np.array_equal(labels, wanted * 7)


@pytest.mark.parametrize("resident", ["on", "off"])
def test_a_part_of_the_data_is_fed_alone(store, feeds, resident):
    data = Data(limit=10)
    subset = training_subset(50, data)
    feed = feeds(store, data=data, resident=resident, with_labels=True)
    images, labels = feed.next(0, 10)
    assert sorted((labels // 7).tolist()) == subset.tolist()
    assert np.array_equal(images, store.images[labels // 7])
    assert feeds(store, resident=resident).next(0, 4)[1] is None


def test_the_next_batches_are_fetched_before_they_are_requested(store, feeds, monkeypatch):
    fetched, gather = [], feed_module._gather
    two_more = threading.Event()

    def watched(images, indices):
        fetched.append(len(indices))
        if len(fetched) == 3:
            two_more.set()
        return gather(images, indices)

    monkeypatch.setattr(feed_module, "_gather", watched)
    feed = feeds(store)
    feed.next(0, 4)
    assert two_more.wait(timeout=20)  # without another call
    for position in (4, 8):
        feed.next(position, 4)
    feed.close()
    assert fetched[:3] == [4, 4, 4] and 3 <= len(fetched) <= 5


def test_a_store_that_fails_says_so_where_the_batch_is_wanted(store, feeds, monkeypatch):
    def broken(images, indices):
        raise OSError("the disk is gone")

    monkeypatch.setattr(feed_module, "_gather", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        feeds(store).next(0, 4)


def test_images_live_on_a_gpu_where_they_leave_room(monkeypatch):
    class Card:
        total_memory = 80_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    gpu = torch.device("cuda", 0)
    fits, how = residence(20_000_000_000, gpu, "auto")
    assert fits and how == (
        "20 GB resident in the memory of cuda:0 (at most a quarter of its 80 GB)"
    )
    fits, how = residence(20_000_000_001, gpu, "auto")
    assert not fits and "memory-mapped, 2 batches ahead (more than a quarter" in how
    assert residence(79_000_000_000, gpu, "on")[0] and not residence(1, gpu, "off")[0]
    assert residence(1, CPU, "on")[0] and not residence(1, CPU, "auto")[0]


def test_batches_go_to_any_kind_of_device(store):
    nowhere = torch.device("meta")  # as to one that has no streams of CUDA's
    feed = Feed(store, np.arange(50), ImageOrder(50, 0), 0, 1, nowhere, "off", with_labels=True)
    images, labels = feed.next(0, 4)
    feed.close()
    assert images.device == labels.device == nowhere


def test_waiting_is_noted_once_and_not_for_a_cold_start(store, feeds):
    feed = feeds(store)
    notes = [feed.note_waiting(share) for share in (0.9, 0.04, 0.06, 0.3, 0.9, 0, 0.9, 0.9)]
    assert [note is not None for note in notes] == [False] * 3 + [True] + [False] * 4
    assert "30 % of the time is spent waiting" in notes[3] and "MASKDM_CACHE" in notes[3]
    assert "--data.resident on" in notes[3]
    resident = feeds(store, resident="on")
    assert "--data.resident" not in [resident.note_waiting(0.5) for _ in range(2)][1]


def test_a_run_that_waits_for_images_says_what_to_do(tiny, tmp_path, monkeypatch, capsys):
    now, fetch, add = [0.0], Feed.next, tick.Tick.add

    def slow_next(*args):
        now[0] += 1
        return fetch(*args)

    def slow_step(*args):
        now[0] += 3
        return add(*args)

    monkeypatch.setattr(tick, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Feed, "next", slow_next)
    monkeypatch.setattr(tick.Tick, "add", slow_step)
    train(tiny, tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("note: 25 % of the time is spent waiting for images") == 1
    assert "feed    115 kB memory-mapped, 2 batches ahead" in printed


def test_resident_and_mapped_images_train_the_same_model(changed, tmp_path):
    weights = []
    for resident in ("on", "off"):
        recipe = changed(data={"source": "digits", "size": 8, "channels": 1, "flip": True,
                               "resident": resident})  # fmt: skip
        result = train(recipe, tmp_path / resident, show=False)
        weights.append(torch.cat([value.flatten() for value in result.ema.state_dict().values()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("data_flip", [False, True])
def test_each_stage_mirrors_as_it_says_or_as_the_data_do(changed, data_flip):
    """About half of 64 images where it does, none where it doesn't; the same noise for both."""
    images = torch.arange(8, dtype=torch.uint8).expand(64, 8, 8)[..., None].contiguous()
    left = {}
    for flip in (None, False, True):
        recipe = changed(data={"source": "digits", "size": 8, "channels": 1, "flip": data_flip})
        stage = recipe.stages[1].model_copy(update={"flip": flip})
        batch = draw_batch(images, None, recipe, stage, make_schedule("cosine"), step=3)
        is_mirrored = batch.x0[:, 0, 0] > batch.x0[:, 0, 1]  # the first patch's first two pixels
        left[flip] = int(is_mirrored.sum())
    assert left[False] == 0 and 16 < left[True] < 48
    assert left[None] == left[data_flip]


def test_every_pass_of_a_packed_store_is_the_folders(image_folder, tmp_path, feeds):
    made = open_store(Data(source=str(image_folder), size=8), progress=False)
    images, labels = feeds(made, with_labels=True).next(0, 6)
    order = ImageOrder(6, 3).indices(0, 6)
    assert np.array_equal(images, made.images[order]) and labels.tolist() == (order // 3).tolist()


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), st.integers(1, 4))
def test_mirroring_turns_those_that_are_chosen(num, height, width, channels):
    generator = torch.Generator().manual_seed(num)
    shape = (num, height, width, channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    chosen = torch.rand(num, generator=generator) < 0.5
    expected = torch.stack(
        [image.flip(1) if turn else image for image, turn in zip(images, chosen, strict=True)]
    )
    assert torch.equal(mirror(images, chosen), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", ["on", "off"])
@pytest.mark.parametrize("name", ["cuda:0", "cuda"])  # a run on one GPU gets the second
def test_a_gpu_gets_the_same_batches(store, resident, name):
    order = ImageOrder(50, 3)
    subset, gpu = np.arange(50), torch.device("cuda", 0)
    feed = Feed(store, subset, order, 0, 1, torch.device(name), resident, with_labels=True)
    for i in range(20):
        images, labels = feed.next(8 * i, 8)
        assert images.device == labels.device == gpu
        wanted = order.indices(8 * i, 8)
        assert np.array_equal((images + 0).cpu(), store.images[wanted])
        assert np.array_equal(labels.cpu(), wanted * 7)
    feed.close()
