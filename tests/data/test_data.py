"""Data sets: each load returns the same rows, and bad files and bad input are refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from sklearn.datasets import load_digits, load_iris, load_wine

from pyrovae import data
from pyrovae.data import mnist, synthetic

needs_mnist = pytest.mark.skipif(
    not os.environ.get("PYROVAE_DATA"), reason="needs MNIST in the folder that PYROVAE_DATA names"
)
NUM_SE = 5  # standard errors allowed in statistical tests

# name: train rows, test rows, features, classes (0: no labels), image shape
SHAPES = {
    "digits": (1437, 360, 64, 10, (8, 8)),
    "mnist": (60000, 10000, 784, 10, (28, 28)),
    "faithful": (272, None, 2, 0, None),
    "iris": (150, None, 4, 3, None),
    "wine": (178, None, 13, 3, None),
    "synthetic-mixture": (2000, 1000, 2, 3, None),
    "synthetic-pinwheel": (2000, 1000, 2, 5, None),
    "synthetic-moons": (2000, 1000, 2, 2, None),
    "synthetic-ppca": (2000, 1000, 10, 0, None),
}
EVERY = [pytest.param(n, marks=needs_mnist) if n == "mnist" else n for n in SHAPES]
SYNTHETIC = [n for n in SHAPES if n.startswith("synthetic")]


# What comes back


def test_every_name_is_tested_and_described():
    assert set(data.names()) == set(SHAPES)
    assert tuple(data.describe()) == data.names()
    assert all(text and "\n" not in text for text in data.describe().values())


@pytest.mark.parametrize("name", EVERY)
def test_a_data_set_has_the_stated_shapes_and_values(name):
    num_train, num_test, data_dim, num_classes, image_shape = SHAPES[name]
    loaded = data.load(name)
    assert loaded.name == name
    assert loaded.data_dim == len(loaded.feature_names) == len(set(loaded.feature_names)) == data_dim
    assert loaded.image_shape == image_shape
    assert image_shape is None or image_shape[0] * image_shape[1] == data_dim
    for x, labels, rows in (
        (loaded.train, loaded.labels_train, num_train),
        (loaded.test, loaded.labels_test, num_test),
    ):
        if rows is None:
            assert x is None
            assert labels is None
            continue
        assert x.dtype == torch.float32
        assert x.shape == (rows, data_dim)
        assert x.isfinite().all()
        assert x.is_contiguous()
        if image_shape:
            assert ((x == 0) | (x == 1)).all()
        if num_classes:
            assert labels.dtype == torch.int64
            assert labels.shape == (rows,)
            assert labels.unique().tolist() == list(range(num_classes))
        else:
            assert labels is None
    assert loaded.convention.endswith(".")
    assert loaded.source
    assert repr(loaded).startswith(f"DataSet {name!r}: {num_train:,} ")
    assert "\n" not in repr(loaded)


def test_a_data_set_is_frozen():
    with pytest.raises(AttributeError):
        data.load("faithful").train = None


def test_faithful_values():
    train = data.load("faithful").train.double()
    torch.testing.assert_close(
        train.mean(0), torch.tensor([3.487783, 70.897059], dtype=torch.float64), atol=1e-6, rtol=0
    )
    # One full Gaussian at its maximum: an exact number of the whole table, order and columns included.
    covariance = torch.cov(train.T, correction=0)
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), covariance)
    assert gaussian.log_prob(train).sum().item() == pytest.approx(-1289.7967, abs=1e-4)


@pytest.mark.parametrize(("name", "loader"), [("iris", load_iris), ("wine", load_wine)])
def test_tables_are_scikit_learns(name, loader):
    loaded, original = data.load(name), loader()
    np.testing.assert_array_equal(loaded.train.numpy(), original.data.astype(np.float32))
    np.testing.assert_array_equal(loaded.labels_train.numpy(), original.target)
    assert loaded.feature_names == tuple(original.feature_names)


def test_digits_are_split_without_loss_and_keep_their_labels():
    loaded, original = data.load("digits", binarize=False), load_digits()

    def table(images, labels):  # rows as (pixels, label), sorted
        return sorted(zip(map(tuple, images), labels, strict=True))

    images = torch.cat([loaded.train, loaded.test]).numpy() * 16
    labels = torch.cat([loaded.labels_train, loaded.labels_test]).numpy()
    assert table(images, labels) == table(original.data, original.target)
    for digit, total in enumerate(np.bincount(original.target)):
        assert abs((loaded.labels_test == digit).sum().item() - total / 5) < 1  # stratified


# Pixels and seeds


@pytest.mark.parametrize("name", ["digits", pytest.param("mnist", marks=needs_mnist)])
def test_binarised_pixels_are_bernoulli_draws_of_the_grey_levels(name):
    grey, binary = data.load(name, binarize=False), data.load(name)
    assert "seed 0" in binary.convention
    assert "binarised" in binary.convention
    assert "grey levels in [0, 1]" in grey.convention
    for g, b in ((grey.train, binary.train), (grey.test, binary.test)):
        assert g.min() == 0
        assert g.max() == 1
        rows = slice(None, None, max(1, len(g) // 2000))  # a sample of MNIST: time
        g, b = g[rows], b[rows]
        assert len(g.unique()) > 2
        assert (b[g == 0] == 0).all()
        assert (b[g == 1] == 1).all()
        inside = (g > 0) & (g < 1)
        g, b = g[inside].double(), b[inside].double()
        variance = g * (1 - g)
        for weight in (torch.ones_like(g), g - g.mean()):  # the mean, and the slope in the grey level
            z = (weight * (b - g)).sum() / (weight**2 * variance).sum().sqrt()
            assert abs(z) < NUM_SE


def test_binarize_none_means_true_for_images_and_false_for_the_rest():
    assert torch.equal(data.load("digits").train, data.load("digits", binarize=True).train)
    assert torch.equal(data.load("iris").train, data.load("iris", binarize=False).train)


def test_train_and_test_get_different_noise():
    """The same generator state for both would repeat the noise of the first rows."""
    grey, binary = data.load("digits", binarize=False), data.load("digits")
    rows = len(grey.test)
    noise = torch.stack([binary.train[:rows] - grey.train[:rows], binary.test - grey.test])
    moving = ((grey.train[:rows] % 1 > 0) & (grey.test % 1 > 0)).flatten()
    correlation = torch.corrcoef(noise.flatten(1)[:, moving])[0, 1]
    assert abs(correlation) < NUM_SE / moving.sum() ** 0.5


@pytest.mark.parametrize("name", ["digits", *SYNTHETIC])
def test_the_same_seed_gives_the_same_numbers(name):
    first, again, other = data.load(name, seed=3), data.load(name, seed=np.int64(3)), data.load(name, seed=4)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.train, other.train)
    assert not torch.equal(first.test, other.test)
    assert "seed 3" in first.convention


def test_the_seed_does_not_change_the_split():
    first, other = data.load("digits", seed=0), data.load("digits", seed=1)
    assert torch.equal(first.labels_train, other.labels_train)
    assert torch.equal(
        data.load("digits", seed=0, binarize=False).test, data.load("digits", seed=1, binarize=False).test
    )


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.load("digits")
    data.load("synthetic-moons")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


# The synthetic distributions are the stated ones


def _assert_moments(x, loc, covariance):
    """Mean and covariance of ``x`` (N, D) are within NUM_SE standard errors of a Gaussian's."""
    n = len(x)
    variance = np.diag(covariance)
    assert (np.abs(x.mean(0) - loc) < NUM_SE * np.sqrt(variance / n)).all()
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert (np.abs(np.cov(x.T) - covariance) < NUM_SE * spread).all()


def test_mixture_has_the_stated_moments_and_is_well_separated():
    loaded = data.load("synthetic-mixture")
    x, labels = loaded.train.double().numpy(), loaded.labels_train.numpy()
    for k, weight in enumerate(synthetic.MIXTURE_WEIGHTS):
        assert abs((labels == k).mean() - weight) < NUM_SE * (weight * (1 - weight) / len(x)) ** 0.5
        _assert_moments(x[labels == k], synthetic.MIXTURE_LOCS[k], synthetic.MIXTURE_COVARIANCES[k])
    nearest = ((x[:, None] - synthetic.MIXTURE_LOCS) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.99


def test_ppca_has_the_stated_moments():
    covariance = synthetic.PPCA_WEIGHT @ synthetic.PPCA_WEIGHT.T + synthetic.PPCA_NOISE_VARIANCE * np.eye(10)
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance)[::-1], [9.25, 4.25, 1.25] + [0.25] * 7)
    loaded = data.load("synthetic-ppca")
    for x in (loaded.train, loaded.test):
        _assert_moments(x.double().numpy(), synthetic.PPCA_LOC, covariance)


def test_pinwheel_arms_are_turns_of_one_another():
    loaded = data.load("synthetic-pinwheel")
    x, labels = loaded.train.double(), loaded.labels_train
    back = torch.view_as_complex(x) * torch.polar(torch.ones(len(x)).double(), -2 * torch.pi * labels.double() / 5)
    turned = torch.view_as_real(back)
    error = turned.std(0) / (len(x) / 5) ** 0.5
    for arm in range(5):
        assert ((turned[labels == arm].mean(0) - turned.mean(0)).abs() < NUM_SE * error).all()
    assert back.abs().mean().item() == pytest.approx(2, abs=0.1)


def test_moons_lie_along_two_half_circles():
    loaded = data.load("synthetic-moons")
    x, labels = loaded.train.double(), loaded.labels_train
    for label, centre, side in ((0, (0.0, 0.0), 1), (1, (1.0, 0.5), -1)):
        relative = x[labels == label] - torch.tensor(centre).double()
        residual = relative.norm(dim=1) - 1
        # The noise across the circle has scale 0.1; its curvature lifts the mean radius by 0.1² / 2.
        n = len(residual)
        assert abs(residual.mean() - 0.005) < NUM_SE * 0.1 / n**0.5
        assert abs(residual.std() - 0.1) < NUM_SE * 0.1 / (2 * n) ** 0.5
        assert ((side * relative[:, 1]) > -0.5).all()


# MNIST: files, cache, mirrors


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Four real IDX files of a few random digits, an empty cache, and the checksums to match."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(256, size=(30, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(10, size=30, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(256, size=(20, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(10, size=20, dtype=np.uint8),
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for stem, array in arrays.items():
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(mnist.MD5, stem, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no progress bars
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    return folder, tmp_path / "cache" / "pyrovae" / "mnist", arrays


@pytest.fixture
def server(small_mnist):
    """(URL of a mirror with these files, the paths asked for so far)."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=small_mnist[0])) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", asked
        httpd.shutdown()
        thread.join()


def _assert_small(loaded, arrays):
    for x, labels, prefix in (
        (loaded.train, loaded.labels_train, "train"),
        (loaded.test, loaded.labels_test, "t10k"),
    ):
        images = arrays[f"{prefix}-images-idx3-ubyte"]
        np.testing.assert_array_equal((x.numpy() * 255).round().reshape(images.shape), images)
        np.testing.assert_array_equal(labels.numpy(), arrays[f"{prefix}-labels-idx1-ubyte"])


@needs_mnist
def test_real_mnist_has_the_known_values():
    loaded = data.load("mnist", binarize=False)  # the MD5 of every file is checked on the way
    assert loaded.train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert loaded.labels_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert loaded.labels_test[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize("subfolder", ["", "mnist"])
@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("by", ["root", "environment"])
def test_mnist_from_a_folder(small_mnist, tmp_path, monkeypatch, subfolder, unpacked, by):
    folder, cache, arrays = small_mnist
    (tmp_path / "mine" / subfolder).mkdir(parents=True)
    for path in folder.iterdir():
        target = tmp_path / "mine" / subfolder / path.name
        if unpacked:
            target.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        else:
            target.write_bytes(path.read_bytes())
    if by == "environment":
        monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "mine"))
    loaded = data.load("mnist", binarize=False, root=tmp_path / "mine" if by == "root" else None)
    _assert_small(loaded, arrays)
    assert not cache.exists()


def test_mnist_downloads_once(small_mnist, server, monkeypatch):
    _, cache, arrays = small_mnist
    url, asked = server
    monkeypatch.setattr(mnist, "MIRRORS", (url,))
    _assert_small(data.load("mnist", binarize=False), arrays)
    assert sorted(asked) == sorted(f"/{stem}.gz" for stem in mnist.MD5)
    assert sorted(p.name for p in cache.iterdir()) == sorted(f"{stem}.gz" for stem in mnist.MD5)
    monkeypatch.setattr(mnist, "MIRRORS", ())  # no network
    _assert_small(data.load("mnist", binarize=False), arrays)
    assert len(asked) == 4


def test_a_folder_without_mnist_does_not_stop_the_download(small_mnist, server, monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "MIRRORS", (server[0],))
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    _assert_small(data.load("mnist", binarize=False), small_mnist[2])


def test_the_second_mirror_is_tried_after_the_first(small_mnist, server, monkeypatch):
    url, asked = server
    monkeypatch.setattr(mnist, "MIRRORS", (f"{url}missing", url))
    _assert_small(data.load("mnist", binarize=False), small_mnist[2])
    assert len(asked) == 8


def test_a_damaged_copy_in_the_cache_is_fetched_again(small_mnist, server, monkeypatch):
    _, cache, arrays = small_mnist
    monkeypatch.setattr(mnist, "MIRRORS", (server[0],))
    cache.mkdir(parents=True)
    whole = (small_mnist[0] / "train-images-idx3-ubyte.gz").read_bytes()
    (cache / "train-images-idx3-ubyte.gz").write_bytes(whole[:1000])
    _assert_small(data.load("mnist", binarize=False), arrays)
    assert (cache / "train-images-idx3-ubyte.gz").read_bytes() == whole


def test_a_damaged_download_is_refused_and_not_kept(small_mnist, server, monkeypatch):
    folder, cache, _ = small_mnist
    monkeypatch.setattr(mnist, "MIRRORS", (server[0],))
    stem = "t10k-images-idx3-ubyte"
    (folder / f"{stem}.gz").write_bytes(gzip.compress(b"<html>log in to this network</html>"))
    with pytest.raises(ValueError, match=r"is damaged: expected MD5 .*; found [0-9a-f]{32}\.") as caught:
        data.load("mnist")
    for part in (f"{server[0]}{stem}.gz", mnist.MD5[stem], "PYROVAE_DATA"):
        assert part in str(caught.value)
    assert sorted(p.name for p in cache.iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


def test_an_error_lists_every_mirror_that_failed(small_mnist, server, monkeypatch, tmp_path):
    url, _ = server
    monkeypatch.setattr(mnist, "MIRRORS", (f"{url}missing/", "http://127.0.0.1:9/"))
    with pytest.raises(ConnectionError) as caught:
        data.load("mnist", root=tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "404", "127.0.0.1", "PYROVAE_DATA", *mnist.MD5):
        assert part in message
    assert not small_mnist[1].exists()


def test_an_unwritable_cache_warns_and_goes_on(small_mnist, server, monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "MIRRORS", (server[0],))
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.warns(UserWarning, match=r"cannot be written .* PYROVAE_DATA"):
        _assert_small(data.load("mnist", binarize=False), small_mnist[2])


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flip(raw: bytes) -> bytes:
    content = bytearray(gzip.decompress(raw))
    content[100] ^= 1
    return gzip.compress(bytes(content))


@pytest.mark.parametrize("damage", [_cut, _flip, lambda raw: b"", lambda raw: b"not gzip"])
def test_a_damaged_file_of_the_users_is_named_and_kept(small_mnist, damage):
    folder, _, _ = small_mnist
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"expected MD5 .*; found .* Replace the file") as caught:
        data.load("mnist", root=folder)
    assert str(path) in str(caught.value)
    assert mnist.MD5[path.stem] in str(caught.value)
    assert path.exists()


# Bad input

BAD_INPUT = [
    (lambda: data.load("minst"), ValueError, r"name: expected one of .*'minst'\. Did you mean 'mnist'"),
    (
        lambda: data.load("h.csv"),
        ValueError,
        r"name: expected one of .* got 'h\.csv'.*pyrovae\.data\.load_file\('h\.csv'\)",
    ),
    (lambda: data.load(Path("a/b.npy")), ValueError, r"name: expected one of .*pyrovae\.data\.load_file\('a/b\.npy'\)"),
    (lambda: data.load(Path("mnist")), ValueError, "name: expected one of .*'mnist'"),
    (lambda: data.load("synthetic"), ValueError, "Did you mean 'synthetic-"),
    (lambda: data.load(3), ValueError, "name: expected one of .* got 3"),
    (lambda: data.load("iris", binarize=True), ValueError, r"'iris' holds no images.*digits, mnist"),
    (lambda: data.load("synthetic-ppca", binarize=True), ValueError, "holds no images"),
    (lambda: data.load("digits", binarize=1), TypeError, "binarize: expected True, False or None; got 1"),
    (lambda: data.load("digits", binarize="no"), TypeError, "binarize: .* got 'no'"),
    (lambda: data.load("digits", seed=-1), ValueError, "seed: .* got -1"),
    (lambda: data.load("digits", seed=0.5), TypeError, r"seed: .* got 0\.5"),
    (lambda: data.load("iris", seed=True), TypeError, "seed: .* got True"),
    (
        lambda: data.load("mnist", root="no/such/folder"),
        FileNotFoundError,
        "root: expected a folder .*no/such",
    ),
    (lambda: data.load("mnist", root=__file__), FileNotFoundError, "root: expected a folder"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD_INPUT)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_environment_variable_must_name_a_folder(monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", "no/such/folder")
    with pytest.raises(FileNotFoundError, match="PYROVAE_DATA: expected a folder"):
        data.load("mnist")


def test_importing_the_data_loads_no_heavy_package():
    code = (
        "import sys, pyro; before = set(sys.modules); import pyrovae.data; "
        "print(*({'sklearn', 'pooch', 'pandas', 'requests', 'scipy'} & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_the_table_is_packaged():
    assert (Path(data.__file__).parent / "faithful.csv").is_file()
