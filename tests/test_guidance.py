"""Guidance, marginals and inpainting, where what should come out is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussians import Correlated, Normal, trained

from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Guidance, Mask, Sampling
from maskdm.sampling.denoise import sparse_denoiser, x0_denoiser
from maskdm.sampling.generate import generate
from maskdm.sampling.guidance import Wanted, guided
from maskdm.sampling.inpaint import inpaint, repaint
from maskdm.sampling.marginal import masks_of_images, patches_of_picture
from maskdm.sampling.samplers import sampling_levels

FOUR = torch.arange(4).expand(3, -1)


def generators(num: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(num)]


class Narrow(Normal):
    mean, std = -0.2, 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_autoguidance_goes_away_from_the_weak_model(scale):
    """Also where the weak one learnt another schedule and prediction: the same noise is meant."""
    strong = trained(Normal, 2, schedule="vp-sde", prediction="v")
    weak = trained(Narrow, 2, schedule="flow", prediction="flow")
    settings = Guidance(kind="autoguidance", scale=scale)
    denoise = guided(Wanted(strong, FOUR, None, settings, weak, generators()))
    x = torch.randn(3, 4, 1)
    for log_snr in (-6.0, 0.0, 5.0):
        alpha, sigma = (
            f(torch.tensor(log_snr)) ** 0.5 for f in (torch.sigmoid, lambda v: torch.sigmoid(-v))
        )
        answers = [
            net.mean
            + alpha * net.std**2 / (alpha**2 * net.std**2 + sigma**2) * (x - alpha * net.mean)
            for net in (Normal, Narrow)
        ]
        expected = answers[1] + scale * (answers[0] - answers[1])
        torch.testing.assert_close(denoise(x, log_snr), expected, rtol=1e-3, atol=1e-3)


def test_guidance_acts_within_its_interval_alone():
    strong = trained(Normal, 2, schedule="vp-sde", prediction="x0")
    weak = trained(Narrow, 2, schedule="vp-sde", prediction="x0")
    settings = Guidance(kind="autoguidance", start=0.3, end=0.6)
    denoise = guided(Wanted(strong, FOUR, None, settings, weak, generators()))
    plain = x0_denoiser(strong, FOUR, None)
    x, t = torch.randn(3, 4, 1), torch.tensor([0.2, 0.29, 0.31, 0.59, 0.61, 0.9])
    acts = [
        not torch.equal(denoise(x, level), plain(x, level))
        for level in strong.schedule.log_snr(t).tolist()
    ]
    assert acts == [False, False, True, True, False, False]
    assert len(weak.model.calls) == 2  # elsewhere it isn't even asked
    with pytest.raises(ValueError, match="start 0.6 is not below end 0.3"):
        Guidance(start=0.6, end=0.3)


def test_classifier_free_guidance_goes_away_from_no_class(tiny, changed):
    recipe = changed(model={**tiny.model.model_dump(), "num_classes": 3})
    model = TrainedModel(build_model(recipe).eval(), recipe.diffusion)
    torch.nn.init.normal_(model.model.label_embed.weight)
    torch.nn.init.normal_(model.model.head.weight)
    positions, labels = torch.arange(16).expand(3, -1), torch.tensor([0, 1, 2])
    settings = Guidance(kind="classifier-free", scale=3.0)
    x = torch.randn(3, 16, 4)
    with torch.no_grad():
        with_class = x0_denoiser(model, positions, labels)(x, 0.5)
        without = x0_denoiser(model, positions, torch.full((3,), 3))(x, 0.5)
        actual = guided(Wanted(model, positions, labels, settings, None, generators()))(x, 0.5)
    torch.testing.assert_close(actual, 3 * with_class - 2 * without, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_class, without)


def test_guidance_that_a_model_cannot_have_is_refused(tiny, changed):
    def model(**settings) -> TrainedModel:
        recipe = changed(model={**tiny.model.model_dump(), **settings})
        return TrainedModel(build_model(recipe).eval(), recipe.diffusion)

    def ask(strong, weak=None, labels=None, **settings):
        return generate(
            strong, Sampling(steps=2, guidance=settings), [0, 1], labels=labels, weak=weak
        )

    plain, blind = model(), model(num_classes=3, label_dropout=0.0)
    with pytest.raises(ValueError, match="the model has no classes"):
        ask(plain, kind="classifier-free")
    with pytest.raises(ValueError, match="was not trained without classes"):
        ask(blind, kind="classifier-free")
    with pytest.raises(ValueError, match="labels are 3 to 3.*are 0 to 2$"):
        ask(blind, labels=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="autoguidance needs a weak model"):
        ask(plain, kind="autoguidance")
    with pytest.raises(ValueError, match="weak model has num_classes 3, the guided one 0"):
        ask(plain, blind, kind="autoguidance")
    with pytest.raises(ValueError, match="classifier-free guidance needs model.num_classes"):
        changed(sampling={"guidance": {"kind": "classifier-free"}})


def test_sparse_denoising_shows_each_patch_only_its_group():
    model = trained(Correlated, schedule="vp-sde", prediction="x0")
    x, seen = torch.randn(3, 4, 1), []
    original = model.model.posterior_mean

    def watched(x, positions, alpha, sigma):
        seen.append(positions)
        return original(x, positions, alpha, sigma)

    model.model.posterior_mean = watched
    answer = sparse_denoiser(model, FOUR, None, 0.5, generators())(x, 0.3)
    assert [tuple(group.shape) for group in seen] == [(3, 2), (3, 2)]
    together = torch.cat(seen, dim=1)
    assert together.sort(dim=1).values.tolist() == FOUR.tolist()
    assert not torch.equal(together[0], together[1])  # each image deals its own
    for group in list(seen):  # the groups' answers lie at the groups' places
        part = x0_denoiser(model, group, None)(x.gather(1, group[..., None]), 0.3)
        torch.testing.assert_close(answer.gather(1, group[..., None]), part)
    whole = sparse_denoiser(model, FOUR, None, 0.05, generators())(x, 0.3)
    torch.testing.assert_close(whole, x0_denoiser(model, FOUR, None)(x, 0.3))
    seen.clear()
    sparse_denoiser(model, FOUR, None, 0.25, generators())(x, 0.3)  # 3 + 1: the last borrows two
    assert [tuple(group.shape) for group in seen] == [(3, 3), (3, 3)]


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 2, 2, 1) as floats in [-1, 1], (N, 4)."""
    return images.reshape(len(images), 4) / 127.5 - 1


def test_all_patches_have_the_joint_and_some_the_marginal_distribution():
    model = trained(Correlated, schedule="vp-cosine", prediction="v")
    settings = Sampling(sampler="dpm-solver", steps=40, clip_x0=False, batch_size=4000)
    joint = pixels(generate(model, settings, list(range(4000))))
    mean, covariance = Correlated.mean.numpy(), Correlated.covariance.numpy()
    np.testing.assert_allclose(joint.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(joint.T), covariance, atol=0.008)
    two = torch.tensor([0, 2]).expand(4000, -1)
    marginal = pixels(generate(model, settings, list(range(4000)), visible=two))
    assert (abs(marginal[:, [1, 3]]) < 0.005).all()  # mid-grey
    np.testing.assert_allclose(marginal[:, [0, 2]].mean(0), mean[[0, 2]], atol=0.02)
    np.testing.assert_allclose(
        np.cov(marginal[:, [0, 2]].T), covariance[np.ix_([0, 2], [0, 2])], atol=0.008
    )


def test_each_image_has_its_own_mask_by_its_number():
    mask = Mask(kind="block", rate=0.5)
    many = masks_of_images(mask, (8, 8), range(6), seed=2)
    assert many.shape == (6, 32) and len({tuple(row) for row in many.tolist()}) > 3
    assert torch.equal(many[3:5], masks_of_images(mask, (8, 8), [3, 4], seed=2))
    assert not torch.equal(many, masks_of_images(mask, (8, 8), range(6), seed=3))


def test_a_picture_selects_whole_patches():
    picture = np.zeros((8, 8), bool)
    picture[0:4, 4:8] = picture[4:8, 0:2] = True
    assert patches_of_picture(picture, 2).tolist() == [2, 3, 6, 7, 8, 12]
    with pytest.raises(ValueError, match="cuts through patches, the first at row 1, column 0"):
        patches_of_picture(picture, 4)
    with pytest.raises(ValueError, match="selects no patch"):
        patches_of_picture(np.zeros((8, 8), bool), 2)


def test_inpainting_keeps_what_is_known_and_draws_the_rest_to_fit():
    """Against the conditional distribution of a Gaussian, which is known."""
    model = trained(Correlated, schedule="vp-sde", prediction="eps")
    image = np.array([[[229], [90]], [[76], [0]]], np.uint8)
    unknown = np.array([[False, True], [False, True]])
    settings = Sampling(steps=40, spacing="log-snr", clip_x0=False, batch_size=400)
    images = inpaint(model, settings, image, unknown, 400, seed=4, resamplings=10, jump=5)
    assert (images[:, ~unknown] == image[~unknown]).all()
    drawn = pixels(images)[:, [1, 3]]
    mean, covariance = Correlated.mean.numpy(), Correlated.covariance.numpy()
    known, free = [0, 2], [1, 3]
    gain = covariance[np.ix_(free, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    expected = mean[free] + gain @ (image.reshape(4)[known] / 127.5 - 1 - mean[known])
    spread = covariance[np.ix_(free, free)] - gain @ covariance[np.ix_(known, free)]
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.07)
    np.testing.assert_allclose(np.cov(drawn.T), spread, atol=0.015)
    # Without going back, what is drawn knows less of what is known.
    once = pixels(inpaint(model, settings, image, unknown, 400, seed=4, resamplings=1))[:, [1, 3]]
    assert abs(once.mean(0) - expected).max() > 2 * abs(drawn.mean(0) - expected).max()


def test_known_values_come_back_as_they_were_given():
    x0, keep = torch.randn(1, 4, 1), torch.tensor([True, False, True, False])[None, :, None]
    model = trained(Correlated, schedule="linear", prediction="x0")
    levels = sampling_levels(model.schedule, Sampling(steps=7))
    denoise, noise = x0_denoiser(model, FOUR, None), torch.randn(3, 4, 1)
    x = repaint(denoise, noise, levels, generators(), x0, keep, resamplings=2, jump=3)
    torch.testing.assert_close(x[:, keep[0, :, 0]], x0[:, keep[0, :, 0]].expand(3, -1, -1))
    with pytest.raises(ValueError, match="resamplings 0 and jump 3 must be at least 1"):
        repaint(denoise, noise, levels, generators(), x0, keep, resamplings=0, jump=3)


def test_inpainting_refuses_what_does_not_fit():
    model, settings = trained(Correlated), Sampling(steps=4)
    image, unknown = np.zeros((2, 2, 1), np.uint8), np.ones((2, 2), bool)
    with pytest.raises(ValueError, match=r"images are \(2, 2, 1\), but the image is \(3, 2, 1\)"):
        inpaint(model, settings, np.zeros((3, 2, 1), np.uint8), unknown, 1)
    with pytest.raises(ValueError, match="leaves nothing to draw"):
        inpaint(model, settings, image, ~unknown, 1)
