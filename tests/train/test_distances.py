"""Distances of features by their closed forms, their spread, their limit, and the extractors of transformers."""

import math

import numpy as np
import pytest
import torch

from train.metrics import distances
from train.metrics.distances import bootstrap, extrapolated_frechet, gaussian_mmd, moments, sliced_wasserstein
from train.metrics.frechet import RunningStatistics


def normal(count, width, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics(features):
    running = RunningStatistics()
    running.update(features)
    return running.finish()


# Closed forms


def test_mmd_of_two_points_is_its_kernel():
    a, b = torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 3), 2.0, dtype=torch.float64)
    assert gaussian_mmd(a, b, bandwidth=2.0, scale=1.0) == pytest.approx(2 - 2 * math.exp(-12 / 8))


def test_mmd_equals_all_pairs_written_out_whatever_the_block(monkeypatch):
    a, b = normal(7, 4), normal(5, 4, seed=1) + 0.5
    kernel = [torch.exp(-torch.cdist(x, y).square() / 8).mean() for x, y in ((a, a), (b, b), (a, b))]
    monkeypatch.setattr(distances, "BLOCK", 3)
    assert gaussian_mmd(a, b, bandwidth=2.0, scale=10.0) == pytest.approx(
        10 * float(kernel[0] + kernel[1] - 2 * kernel[2])
    )


def test_mmd_of_gaussians_nears_its_integral():
    """E k(x, y) of N(0, 1) and N(d, 1) is s / sqrt(s² + 2) · exp(-d² / (2 (s² + 2))) in one dimension."""
    spread, shift = 2.0, 1.5
    a, b = normal(4000, 1), normal(4000, 1, seed=1) + shift
    factor = spread / math.sqrt(spread**2 + 2)
    wanted = 2 * factor * (1 - math.exp(-(shift**2) / (2 * (spread**2 + 2))))
    assert gaussian_mmd(a, b, spread, 1.0) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("counts", [(6, 6), (6, 4), (5, 7)])
def test_sliced_distance_in_one_dimension_is_that_of_the_quantile_functions(counts):
    a, b = normal(counts[0], 1), 3 * normal(counts[1], 1, seed=1) + 1
    at = (np.arange(420) + 0.5) / 420  # 420 is a multiple of 4, 5, 6 and 7
    one, other = (np.sort(x[:, 0].numpy())[(at * len(x)).astype(int)] for x in (a, b))
    assert sliced_wasserstein(a, b, directions=3) == pytest.approx(np.square(one - other).mean())


def test_sliced_distance_of_a_shift_is_its_squared_length():
    a = normal(50, 6)
    shift = torch.tensor([3.0, 0, 0, 0, 4.0, 0], dtype=torch.float64)
    assert sliced_wasserstein(a, a + shift, directions=20000) == pytest.approx(25, rel=0.03)
    assert sliced_wasserstein(a, a) == 0


def test_sliced_distance_sees_what_moments_do_not():
    """Two points and a Gaussian of one mean and covariance: no Fréchet distance tells them apart."""
    a = normal(2000, 1).sign()
    b = normal(2000, 1, seed=1)
    b = (b - b.mean()) / b.std() * a.std() + a.mean()
    assert sliced_wasserstein(a, b) == pytest.approx(2 - 2 * math.sqrt(2 / math.pi), rel=0.05)


def test_spread_of_a_mean_is_its_standard_error():
    features = normal(400, 1)
    found = bootstrap(lambda part: float(part.mean()), features, resamples=400)
    assert found == pytest.approx(float(features.std()) / 20, rel=0.15)
    assert found == bootstrap(lambda part: float(part.mean()), features, resamples=400)
    with pytest.raises(ValueError, match="at least 2 resamples, got 1"):
        bootstrap(lambda part: 0.0, features, resamples=1)


def test_extrapolation_takes_the_bias_of_few_images_away():
    width = 20
    reference = statistics(normal(60000, width, seed=1))
    features = normal(1000, width)
    biased = distances.frechet_distance(moments(features, reference), reference, warn=False)
    unbiased = extrapolated_frechet(features, reference)
    assert abs(unbiased) < 0.25 * biased, (unbiased, biased)


def test_extrapolation_of_a_line_is_its_value_at_zero():
    sizes = [100, 150, 300, 600]
    assert distances._at_infinity(sizes, [5 + 40 / size for size in sizes]) == pytest.approx(5)


def test_extrapolation_from_too_few_images_is_refused():
    with pytest.raises(ValueError, match="more than 100 images for 20 features, got 100"):
        extrapolated_frechet(normal(100, 20), statistics(normal(100, 20)))


# DINOv2 and CLIP with random weights


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 3, 40, 56), dtype=np.uint8)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Dinov2Model(config)
    folder = tmp_path_factory.mktemp("dino")
    network.save_pretrained(folder)
    return folder


def test_dinov2_equals_torch_fidelity_s_extractor(dino_folder, pixels, monkeypatch):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    from train.metrics.extractors import make_extractor

    ours = make_extractor("dinov2", str(dino_folder), "cpu")

    class ClassToken(torch.nn.Module):
        def forward(self, x):
            return ours.network(x).pooler_output

    monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: ClassToken())
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    (wanted,) = theirs(torch.from_numpy(pixels))
    found = ours.features(pixels)["features"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert ours.metric.startswith("FD-dinov2[dinov2-")


def test_clip_embeddings_are_those_of_the_model_and_of_length_one(tmp_path, pixels):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch_fidelity")
    from train.metrics.extractors import make_extractor

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=8,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    extractor = make_extractor("clip", str(tmp_path), "cpu")
    square = np.random.default_rng(1).integers(0, 256, (2, 3, 28, 28), dtype=np.uint8)
    found = extractor.features(square)["features"]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    inputs = processor([x.transpose(1, 2, 0) for x in square], return_tensors="pt")
    wanted = extractor.network(**inputs).image_embeds
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert extractor.features(pixels)["features"].shape == (3, 8)


def test_weights_of_another_network_are_refused(dino_folder):
    pytest.importorskip("torch_fidelity")
    from train.metrics.extractors import make_extractor, split_extractor

    with pytest.raises(ValueError, match="holds no weights of CLIPVisionModelWithProjection"):
        make_extractor("clip", str(dino_folder), "cpu")
    assert split_extractor("dinov2=some/folder") == ("dinov2", "some/folder")
    with pytest.raises(ValueError, match="'vgg' is not an extractor"):
        split_extractor("vgg")
