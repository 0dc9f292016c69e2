"""FD-emoji: exact values of both distances, order and batches, files, labels, and that damage raises it."""

from __future__ import annotations

import json
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from train.emoji import rank as rank_extractor
from train.emoji.dataset import EmojiDataset
from train.emoji.features import FeatureExtractor, default_extractor, register_with_torch_fidelity
from train.metrics import frechet
from train.metrics.frechet import (
    RunningStatistics,
    Statistics,
    fd_emoji,
    frechet_distance,
    kernel_distance,
    load_statistics,
    reference_labels,
    reference_statistics,
    save_statistics,
    statistics_of,
)

# Of four classes with 273 training pictures, few enough to measure often.
CLASSES = ["face", "animal", "clock", "fruit"]


@pytest.fixture(scope="module")
def data() -> EmojiDataset:
    return EmojiDataset("train", 32, CLASSES)


@pytest.fixture(scope="module")
def reference() -> Statistics:
    return reference_statistics(32, CLASSES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_features(features: torch.Tensor) -> Statistics:
    running = RunningStatistics()
    running.update(features)
    return running.finish()


def plain(mean: torch.Tensor, covariance: torch.Tensor, num_pictures: int = 10_000) -> Statistics:
    return Statistics(mean, covariance, num_pictures)


def distance(a: Statistics, b: Statistics) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frechet_distance(a, b)


# Exact values


def diagonal(width: int = 64) -> tuple[torch.Tensor, ...]:
    m1, m2 = torch.linspace(-1, 2, width).double(), torch.linspace(3, 0, width).double()
    v1, v2 = torch.linspace(0.1, 4, width).double(), torch.linspace(5, 0.01, width).double()
    return m1, v1, m2, v2


def closed_form(m1: torch.Tensor, v1: torch.Tensor, m2: torch.Tensor, v2: torch.Tensor) -> float:
    return sum((a - b) ** 2 for a, b in zip(m1.tolist(), m2.tolist(), strict=True)) + sum(
        (math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(v1.tolist(), v2.tolist(), strict=True)
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_of_diagonal_gaussians(rotated):
    m1, v1, m2, v2 = diagonal()
    turn = torch.linalg.qr(random(64, 64))[0] if rotated else torch.eye(64, dtype=torch.float64)
    a, b = plain(turn @ m1, turn * v1 @ turn.T), plain(turn @ m2, turn * v2 @ turn.T)
    expected = closed_form(m1, v1, m2, v2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_of_features_with_exactly_these_moments():
    m1, v1, m2, v2 = diagonal()
    sets = []
    for seed, mean, variance in ((1, m1, v1), (2, m2, v2)):
        features = random(500, 64, seed=seed)
        features = features - features.mean(dim=0)
        white = torch.linalg.qr(features)[0] * math.sqrt(499)
        sets.append(of_features(white * variance.sqrt() + mean))
    assert frechet_distance(*sets) == pytest.approx(closed_form(m1, v1, m2, v2), rel=1e-12)


def test_of_one_feature():
    """(m1 - m2)^2 + (s1 - s2)^2 = 4 + 1."""
    a = plain(torch.tensor([1.0]).double(), torch.tensor([[9.0]]).double())
    b = plain(torch.tensor([3.0]).double(), torch.tensor([[4.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(5.0, rel=1e-14)


def test_of_matrices_that_do_not_commute():
    """Against the eigenvalues of S1^1/2 S2 S1^1/2, the form in which the distance is usually written."""
    a, b = of_features(random(300, 20, seed=1) @ random(20, 20, seed=2)), of_features(random(300, 20, seed=3) + 1.0)
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ b.covariance @ root).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * between
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-11)


def test_of_fewer_pictures_than_features():
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T for centred features A and B, with no covariance at all."""
    x, y = random(30, 80, seed=1), 2.0 * random(40, 80, seed=2) + 0.5
    a, b = (x - x.mean(0)) / math.sqrt(29), (y - y.mean(0)) / math.sqrt(39)
    between = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * between
    assert distance(of_features(x), of_features(y)) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count", [20, 400])
def test_a_set_is_at_no_distance_from_itself(count):
    features = 50.0 * random(count, 64) + 1000.0
    assert distance(of_features(features), of_features(features.flip(0))) == pytest.approx(0.0, abs=1e-7)


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = random(5, 3, seed=1), random(7, 3, seed=2) + 0.5

    def kernel(p: torch.Tensor, q: torch.Tensor) -> float:
        return (sum(a * b for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 3 + 1.0) ** 3

    expected = (
        sum(kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j) / (5 * 4)
        + sum(kernel(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j) / (7 * 6)
        - 2 * sum(kernel(p, q) for p in x for q in y) / (5 * 7)
    )
    assert kernel_distance(of_features(x), of_features(y)) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_in_blocks(monkeypatch):
    a, b = of_features(random(50, 4, seed=1)), of_features(random(40, 4, seed=2) + 0.5)
    whole = kernel_distance(a, b)
    monkeypatch.setattr(frechet, "KERNEL_BLOCK", 7)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-11)


def test_kernel_distance_has_no_bias():
    """Of sets alike it is 0 on average, where a biased one would be about 0.4 for these sizes."""
    values = [
        kernel_distance(of_features(random(20, 4, seed=2 * i)), of_features(random(20, 4, seed=2 * i + 1)))
        for i in range(200)
    ]
    assert abs(sum(values) / len(values)) < 0.05


# Statistics in a stream


def test_mean_and_covariance_far_from_zero():
    features = random(300, 6) + 1e6
    statistics = of_features(features)
    torch.testing.assert_close(statistics.mean, features.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.covariance, torch.cov((features - 1e6).T), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sizes", [[1] * 200, [199, 1], [1, 199], [64, 64, 64, 8], [0, 200, 0]])
def test_batches_do_not_matter_to_features(sizes):
    features = random(200, 8) * 3.0 + 100.0
    running = RunningStatistics()
    for part in features.split(sizes):
        running.update(part)
    statistics = running.finish()
    assert statistics.num_pictures == 200
    torch.testing.assert_close(statistics.mean, features.mean(dim=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.covariance, torch.cov(features.T), rtol=1e-11, atol=1e-11)
    assert statistics.features is not None and torch.equal(statistics.features, features)


def test_order_and_batches_do_not_matter_to_the_distances(data, reference):
    pictures = data.pixel_values[::3]
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    streams = [[pictures], pictures[order].split(7), list(pictures.flip(0)), pictures]
    values = []
    for stream in streams:
        statistics = statistics_of(stream)
        values.append((distance(statistics, reference), kernel_distance(statistics, reference)))
    for fd, kd in values[1:]:
        assert fd == pytest.approx(values[0][0], rel=1e-9)
        assert kd == pytest.approx(values[0][1], rel=1e-9)


def test_too_few_pictures_are_refused(data):
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        statistics_of(data.pixel_values[:1])
    with pytest.raises(ValueError, match="got 0"):
        statistics_of([])
    one = plain(torch.zeros(3).double(), torch.eye(3).double(), num_pictures=1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet_distance(one, one)


def test_features_that_are_not_finite_are_refused():
    features = random(10, 4)
    features[3, 1], features[7, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 10 images are not finite"):
        of_features(features)
    broken = plain(torch.tensor([math.nan]).double(), torch.eye(1).double())
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(broken, broken)


def test_features_of_another_width_are_refused():
    running = RunningStatistics()
    running.update(random(3, 4))
    with pytest.raises(ValueError, match=r"\(B, 4\), got \(3, 5\)"):
        running.update(random(3, 5))
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance(of_features(random(20, 4)), of_features(random(20, 5)))


def test_few_pictures_for_the_features_are_warned_of():
    with pytest.warns(UserWarning, match="15 images are fewer than twice the 8 features"):
        frechet_distance(of_features(random(15, 8)), of_features(random(16, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(of_features(random(16, 8)), of_features(random(16, 8)))


def test_a_kernel_distance_needs_features(data):
    kept, dropped = (statistics_of(data.pixel_values[:4], keep_features=keep) for keep in (True, False))
    assert dropped.features is None
    with pytest.raises(ValueError, match="keep_features=True"):
        kernel_distance(kept, dropped)


# Files


def another_extractor() -> FeatureExtractor:
    ours = default_extractor()
    tensors = {key.replace("_weight", ".weight").replace("_bias", ".bias"): t for key, t in ours.named_buffers()}
    tensors = {key.replace("convs_", "convs."): tensor for key, tensor in tensors.items()}
    return FeatureExtractor(tensors, ours.name, "f" * 64)


@pytest.mark.parametrize("keep", [True, False])
def test_a_file_gives_the_statistics_back(tmp_path, data, keep):
    statistics = statistics_of(data.pixel_values[:9], keep_features=keep)
    save_statistics(tmp_path / "s.safetensors", statistics)
    loaded = load_statistics(tmp_path / "s.safetensors")
    assert (loaded.num_pictures, loaded.extractor, loaded.sha256) == (9, default_extractor().label, statistics.sha256)
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
    assert (loaded.features is not None) == keep
    assert distance(loaded, statistics) == pytest.approx(0.0, abs=1e-9)


def test_statistics_of_another_extractor_are_refused(tmp_path, data):
    theirs = statistics_of(data.pixel_values[:9], another_extractor())
    ours = statistics_of(data.pixel_values[:9])
    save_statistics(tmp_path / "s.safetensors", theirs)
    with pytest.raises(ValueError, match=r"emoji-cnn-v1-ffffffff, not emoji-cnn-v1-"):
        load_statistics(tmp_path / "s.safetensors")
    assert load_statistics(tmp_path / "s.safetensors", another_extractor()).extractor == theirs.extractor
    for measure in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="different extractors"):
            measure(ours, theirs)


def test_damaged_files_are_refused(tmp_path, data):
    path = tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="no statistics"):
        load_statistics(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no statistics"):
        load_statistics(path)
    save_statistics(path, statistics_of(data.pixel_values[:9]))
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no statistics"):
        load_statistics(path)
    ours = default_extractor()
    facts = {"format": frechet.FORMAT, "extractor": ours.label, "sha256": ours.sha256, "num_pictures": 9}
    save_file({**tensors, "mean": tensors["mean"][:5].clone()}, path, {"statistics": json.dumps(facts)})
    with pytest.raises(ValueError, match="covariance is"):
        load_statistics(path)
    save_file(tensors, path, {"statistics": json.dumps({**facts, "format": "other"})})
    with pytest.raises(ValueError, match="'other'"):
        load_statistics(path)


# Labels


@pytest.mark.parametrize("count", [1, 5, 100, 273, 1000])
def test_labels_have_the_reference_s_frequencies(data, count):
    labels = reference_labels(count, CLASSES)
    assert labels.shape == (count,) and labels.dtype == torch.int64
    shares = torch.bincount(data.labels).double() / len(data)
    counts = torch.bincount(labels, minlength=4)
    assert (counts - count * shares).abs().max() < 1.0
    if count == len(data):
        assert torch.equal(counts, torch.bincount(data.labels))


def test_labels_are_spread_evenly_and_follow_the_order_of_classes(data):
    labels = reference_labels(1000, CLASSES)
    shares = torch.bincount(data.labels).double() / len(data)
    for end in (50, 300, 700):
        assert (torch.bincount(labels[:end], minlength=4) - end * shares).abs().max() < 2.0
    turned = reference_labels(1000, CLASSES[::-1])
    assert torch.equal(torch.bincount(turned), torch.bincount(labels).flip(0))
    assert torch.equal(labels, reference_labels(1000, CLASSES))


def test_wrong_labels_requests_are_refused():
    with pytest.raises(ValueError, match="num_pictures is 0"):
        reference_labels(0)
    with pytest.raises(ValueError, match="unknown class 'cow'"):
        reference_labels(4, ["cow"])


# FD-emoji


def test_of_the_reference_itself_is_0(data):
    with pytest.warns(UserWarning, match="273 images are fewer than 2048"):
        result = fd_emoji(data.pixel_values, CLASSES, data.labels)
    label = default_extractor().label
    assert result["name"] == f"FD-emoji[{label}]" and result["extractor"] == label
    assert result["value"] == pytest.approx(0.0, abs=1e-9)
    assert result["n"] == result["reference_n"] == 273
    assert result["floor"] > 0.1 and result["floor_n"] == 136


def test_equals_its_parts(data, reference):
    pictures = (data.pixel_values[::2].float() / 127.5 - 1.0).flip(3)
    with pytest.warns(UserWarning, match="fewer than"):
        result = fd_emoji(pictures.split(50), CLASSES)
    statistics = statistics_of(pictures)
    assert result["value"] == pytest.approx(distance(statistics, reference), rel=1e-9)
    assert result["kernel_distance"] == pytest.approx(kernel_distance(statistics, reference), rel=1e-9)


def test_compares_pictures_with_the_reference_of_their_size():
    large = EmojiDataset("train", 64, CLASSES)
    with pytest.warns(UserWarning, match="fewer than"):
        assert fd_emoji(large.pixel_values, CLASSES)["value"] == pytest.approx(0.0, abs=1e-9)
    assert reference_statistics(128, CLASSES) is reference_statistics(64, CLASSES)
    assert reference_statistics(64, CLASSES) is not reference_statistics(32, CLASSES)


def test_split_and_classes_choose_the_reference(reference):
    assert reference.num_pictures == 273
    assert reference_statistics(32, CLASSES, "test").num_pictures == len(EmojiDataset("test", 32, CLASSES))
    assert reference_statistics(32, CLASSES[:1]).num_pictures == 95


def test_the_mean_of_the_floor_falls_with_the_number_of_pictures(reference):
    floors = [frechet.floor_distance(reference, count) for count in (20, 60, 136, 5000)]
    assert [size for _, size in floors] == [20, 60, 136, 136]
    assert floors[0][0] > floors[1][0] > floors[2][0] > 0
    assert floors[2] == floors[3] == frechet.floor_distance(reference, 136)


def test_the_floor_is_that_of_two_halves_without_common_pictures():
    """Of halves of a large normal sample it is near the small distance that chance makes, and never 0."""
    statistics = of_features(random(400, 4))
    value, size = frechet.floor_distance(statistics, 10_000)
    assert size == 200 and 0.005 < value < 0.1
    shared = of_features(torch.cat([random(1, 4)] * 8))
    assert frechet.floor_distance(shared, 8)[0] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        frechet.floor_distance(of_features(random(3, 4)), 3)


def test_held_out_emoji_are_near_their_floor():
    """The network has learnt the training part; were its features memories, held-out emoji would be far away."""
    with pytest.warns(UserWarning, match="fewer than"):
        result = fd_emoji(EmojiDataset("test", 32).pixel_values)
    assert 0.5 * result["floor"] < result["value"] < 1.5 * result["floor"]
    assert abs(result["kernel_distance"]) < 0.01


def test_enough_pictures_are_not_warned_of():
    pictures = EmojiDataset("all", 32).pixel_values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fd_emoji(torch.cat([pictures, pictures])[:2048])
    assert result["n"] == 2048 and result["reference_n"] == 1198


def test_labels_in_other_frequencies_are_warned_of(data):
    pictures, balanced = data.pixel_values[:80], torch.arange(80) % 4
    with pytest.warns(UserWarning, match="of another class"):
        fd_emoji(pictures, CLASSES, balanced)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fd_emoji(pictures, CLASSES, reference_labels(80, CLASSES))
    assert not any("another class" in str(warning.message) for warning in caught)
    with pytest.raises(ValueError, match="one per image"):
        fd_emoji(pictures, CLASSES, balanced[:5])
    with pytest.raises(ValueError, match="expected 0 to 3"):
        fd_emoji(pictures, CLASSES, balanced + 1)


def test_pictures_in_another_range_are_warned_of(data):
    with pytest.warns(UserWarning, match=r"in \[0, 1\]"):
        fd_emoji(data.pixel_values[:20].float() / 255, CLASSES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fd_emoji(data.pixel_values[:20], CLASSES)
        fd_emoji(data.pixel_values[:20].float() / 127.5 - 1, CLASSES)
    assert not any("[0, 1]" in str(warning.message) for warning in caught)


def test_a_small_reference_is_warned_of(data):
    with pytest.warns(UserWarning, match="the reference has 28 emoji"):
        fd_emoji(data.pixel_values[data.labels == 2], ["clock"])


def test_pictures_of_two_sizes_are_refused(data):
    with pytest.raises(ValueError, match="32 and 40"):
        fd_emoji([data.pixel_values[:4], torch.zeros(4, 3, 40, 40)], CLASSES)


def test_the_global_random_state_is_left_alone(data):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="fewer than"):
        fd_emoji(data.pixel_values[:30], CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


# Does it rank?


def with_noise(data: EmojiDataset, strength: float) -> torch.Tensor:
    noise = torch.randn(data.pixel_values.shape, generator=torch.Generator().manual_seed(0))
    return (data.pixel_values + strength * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(data: EmojiDataset, strength: float) -> torch.Tensor:
    x = data.pixel_values.float()
    for _ in range(int(strength)):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=255.0), 3, stride=1)
    return x.round().to(torch.uint8)


def upside_down(data: EmojiDataset, strength: float) -> torch.Tensor:
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: round(strength * len(data))]
    pictures = data.pixel_values.clone()
    pictures[chosen] = pictures[chosen].flip(2)
    return pictures


def wrong_mix(data: EmojiDataset, strength: float) -> torch.Tensor:
    """A share of the pictures is replaced by clocks, each a true one."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))[: round(strength * len(data))]
    clocks = data.pixel_values[data.labels == CLASSES.index("clock")]
    pictures = data.pixel_values.clone()
    pictures[chosen] = clocks[torch.arange(len(chosen)) % len(clocks)]
    return pictures


@pytest.mark.parametrize(
    ("damage", "strengths", "least"),
    [
        (with_noise, (8, 16, 32, 64), 5.0),
        (blurred, (1, 2, 4, 8), 5.0),
        (upside_down, (0.1, 0.25, 0.5, 1.0), 1.0),
        (wrong_mix, (0.2, 0.4, 0.7, 1.0), 10.0),
        (rank_extractor.of_wrong_classes, (0.1, 0.25, 0.5, 1.0), 5.0),
    ],
)
def test_damage_raises_both_distances_with_its_strength(data, reference, damage, strengths, least):
    measured = [statistics_of(damage(data, strength)) for strength in strengths]
    for values in (
        [distance(reference, reference), *(distance(statistics, reference) for statistics in measured)],
        [kernel_distance(reference, reference), *(kernel_distance(statistics, reference) for statistics in measured)],
    ):
        assert all(weaker < stronger for weaker, stronger in zip(values, values[1:], strict=False)), values
    assert distance(measured[-1], reference) > least


# torch-fidelity


@pytest.fixture(scope="module")
def fidelity():
    return pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, which is not installed")


class Pictures(torch.utils.data.Dataset):
    """uint8 pictures without labels, as torch-fidelity wants them."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pictures[index]


def test_torch_fidelity_finds_the_same_distances(fidelity, data, reference):
    damaged = with_noise(data, 16)
    name = register_with_torch_fidelity()
    assert name == register_with_torch_fidelity() == default_extractor().label and name.startswith("emoji-")
    theirs = fidelity.calculate_metrics(
        input1=Pictures(damaged),
        input2=Pictures(data.pixel_values),
        feature_extractor=name,
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=len(data),
        batch_size=40,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = statistics_of(damaged)
    assert distance(ours, reference) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert kernel_distance(ours, reference) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_torch_fidelity_may_not_bring_other_weights(fidelity):
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    name = register_with_torch_fidelity()
    with pytest.raises(ValueError, match="its own weights"):
        FEATURE_EXTRACTORS_REGISTRY[name](name, ["features"], feature_extractor_weights_path="weights.pth")
    network = FEATURE_EXTRACTORS_REGISTRY[name](name, ["features", "logits"])
    with pytest.raises(ValueError, match="float32"):
        network(torch.zeros(2, 3, 32, 32))
    assert [output.shape[1] for output in network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))] == [128, 19]


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        register_with_torch_fidelity()


def test_steps_of_a_run_are_ranked_by_its_log(tmp_path, monkeypatch, capsys):
    """Lines of other things are passed over; a distance that rises is told by the exit code."""
    monkeypatch.setattr(rank_extractor, "rank_damage", lambda: {"noise": {"0": 0.0, "8": 1.0}})
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "FD-emoji[x]": 9.0, "floor": 0.1}\n{"step": 2, "loss": 1}\n{"step": 3, "FD-emoji[x]": 4.0}'
    )
    assert rank_extractor.rank_steps(tmp_path) == {"FD-emoji[x]": {"1": 9.0, "3": 4.0}}
    assert rank_extractor.main(["--run", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["noise"] == {"0": 0.0, "8": 1.0}
    log.write_text(log.read_text() + '\n{"step": 5, "FD-emoji[x]": 6.0}')
    assert rank_extractor.main(["--run", str(tmp_path)]) == 1
    assert "does not fall throughout" in capsys.readouterr().out
    log.write_text('{"step": 1, "FD-emoji[x]": 9.0}')
    assert rank_extractor.main(["--run", str(tmp_path)]) == 2
    assert "fewer than two distances" in capsys.readouterr().err
