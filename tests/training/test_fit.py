"""fit: the numbers that it reports, its promises on seeds, data and resuming, and its refusals."""

from __future__ import annotations

import math
import signal
import time
import weakref
from contextlib import nullcontext
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import pyrovae as pv
from pyrovae.checkpoint import load_state, save_state
from pyrovae.checks import pick_device
from pyrovae.infer import LOSSES, Trace_ELBO
from pyrovae.training import SCHEDULES, TrainingDiverged, fit

NUM_SE = 5  # standard errors allowed in statistical tests


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


class Location(pv.Pair):
    """x ~ N(loc, 1). No latent, so its bound is log p(x) and the gradient of the mean loss is loc − mean(batch)."""

    def __init__(self, data_dim=2):
        super().__init__()
        self.data_dim = data_dim
        self.loc = nn.Parameter(torch.zeros(data_dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)


class Latent(pv.Pair):
    """z ~ N(0, 1), x | z ~ N(z + loc, 1), a linear guide: the smallest pair with noise in its gradient."""

    def __init__(self, data_dim=2):
        super().__init__()
        self.data_dim = data_dim
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.encode = nn.Linear(data_dim, data_dim)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.data_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.5).to_event(1))


class GlobalMean(pv.Pair):
    """mu ~ N(0, 3²), x ~ N(mu, 1): the mean is a global latent with a known posterior."""

    data_dim = 1
    prior_scale = 3.0

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), self.prior_scale))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, self.log_scale.exp()))


class Recording(Trace_ELBO):
    """Keep every training batch and every held-out batch that fit gives to it."""

    def __init__(self):
        super().__init__()
        self.batches, self.held_out = [], []

    def loss_and_grads(self, model, guide, x):
        self.batches.append(x.clone())
        return super().loss_and_grads(model, guide, x)

    def loss(self, model, guide, x):
        self.held_out.append(x.clone())
        return super().loss(model, guide, x)


class Interrupted(Trace_ELBO):
    """Ctrl-C at the ``at``-th training step; None: never."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.steps = at, 0

    def loss_and_grads(self, model, guide, x):
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt
        return super().loss_and_grads(model, guide, x)


@pytest.fixture(autouse=True)
def one_thread(guard_globals):
    """These tensors are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def x():
    return torch.randn(23, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, -1.0])


@pytest.fixture
def grey():
    return torch.rand(24, 6, generator=torch.Generator().manual_seed(1))


def new(make, seed=0):
    torch.manual_seed(seed)
    return make()


def weights(pair):
    return {name: value.clone() for name, value in pair.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


# Seeds and global state


def test_same_seed_same_weights_bit_for_bit(x):
    pairs = [new(Latent) for _ in range(3)]
    results = [fit(pair, x, epochs=3, batch_size=5, seed=seed) for pair, seed in zip(pairs, (7, 7, 8), strict=True)]
    assert_same(weights(pairs[0]), weights(pairs[1]))
    assert without_seconds(results[0].history) == without_seconds(results[1].history)
    assert not torch.equal(pairs[0].loc, pairs[2].loc)


@pytest.mark.parametrize("binarize", [False, True])
def test_caller_state_is_untouched(grey, binarize):
    torch.manual_seed(3)
    random = torch.get_rng_state()
    dtype = torch.get_default_dtype()
    for on in (True, False):
        with pyro.validation_enabled(on):
            fit(Latent(6), grey, epochs=2, batch_size=5, validation=0.25, binarize=binarize)
            assert pyro.poutine.util.is_validation_enabled() == on
            assert dist.Normal(0.0, 1.0)._validate_args == on
        torch.manual_seed(3)
        pair = Latent(6)  # draws its weights
        after = torch.get_rng_state()
        fit(pair, grey, epochs=1, validation=0.25, binarize=binarize)
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_default_dtype() == dtype
    assert len(pyro.get_param_store()) == 0


def test_data_are_untouched(grey):
    before = grey.clone()
    fit(Latent(6), grey, epochs=2, batch_size=5, binarize=True, validation=4)
    assert torch.equal(grey, before)


# History and its units


def test_history_columns_and_units(x):
    held_out = x[:4] + 1
    pair = Location()
    result = fit(pair, x, epochs=3, batch_size=3, lr=1e-12, validation=held_out, optimizer=sgd)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert [row["step"] for row in result.history] == [8, 16, 24]
    assert result.steps == 24
    for row in result.history:
        assert list(row) == ["epoch", "step", "train_bound", "validation_bound", "lr", "seconds"]
        # nats per datum: the mean over data of log N(x | 0, 1), summed over features
        for name, rows in (("train_bound", x), ("validation_bound", held_out)):
            expected = -0.5 * rows.double().square().sum(-1).mean() - math.log(2 * math.pi)
            assert row[name] == pytest.approx(float(expected), rel=1e-6)
    seconds = [row["seconds"] for row in result.history]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] == result.seconds
    assert "nats per datum" in str(result)
    assert "24 steps" in str(result)
    assert "validation bound" in str(result)
    assert not result.stopped_early


def test_a_count_of_one_has_a_singular_noun(x):
    assert str(fit(Location(), x, epochs=1, batch_size=100)).startswith("1 epoch, 1 step in ")
    assert str(fit(Location(), x, epochs=2, batch_size=100)).startswith("2 epochs, 2 steps in ")


def test_without_validation_there_is_no_validation_bound(x):
    assert "validation_bound" not in fit(Location(), x, epochs=1).history[0]


def test_short_last_batch_is_exact(x):
    """The weights after two epochs equal those of gradient descent written out, also through the batch of 3."""
    loss, pair = Recording(), Location()
    fit(pair, x, loss=loss, epochs=2, batch_size=5, lr=0.1, schedule="constant", optimizer=sgd)
    assert [len(batch) for batch in loss.batches] == [5, 5, 5, 5, 3] * 2
    for epoch in (loss.batches[:5], loss.batches[5:]):  # every datum once an epoch
        assert torch.equal(torch.cat(epoch).sort(0).values, x.sort(0).values)
    assert not torch.equal(loss.batches[0], loss.batches[5])  # in a new order
    loc, bounds = torch.zeros(2, dtype=torch.float64), []
    for batch in loss.batches:
        loc = loc - 0.1 * (loc - batch.double().mean(0))
        bounds.append(loc)
    torch.testing.assert_close(pair.loc.detach().double(), loc, rtol=1e-6, atol=1e-6)


def test_train_bound_weighs_the_short_batch_by_its_size(x):
    """Each bound is taken before its update, and the epoch's is the mean over data, not over batches."""
    loss = Recording()
    row = fit(Location(), x, loss=loss, epochs=1, batch_size=5, lr=0.1, optimizer=sgd).history[0]
    loc, total, factor = torch.zeros(2, dtype=torch.float64), 0.0, SCHEDULES["cosine"]
    for step, batch in enumerate(loss.batches):
        batch = batch.double()
        total += float(dist.Normal(loc, 1.0).log_prob(batch).sum())
        loc = loc - 0.1 * factor(step / 5) * (loc - batch.mean(0))
    assert row["train_bound"] == pytest.approx(total / 23, rel=1e-6)


def test_batch_size_above_the_data(x):
    pair = Location()
    result = fit(pair, x, epochs=2, batch_size=1000, lr=1.0, schedule="constant", optimizer=sgd)
    assert result.steps == 2
    torch.testing.assert_close(pair.loc.detach(), x.mean(0))


# Validation, early stopping, schedules


@pytest.mark.parametrize(("validation", "count"), [(0.25, 6), (5, 5), (torch.full((3, 2), 9.0), 3)])
def test_validation_as_share_count_or_tensor(x, validation, count):
    loss = Recording()
    fit(Location(), x, loss=loss, epochs=2, batch_size=100, validation=validation, seed=3)
    first, second = [rows for rows in loss.held_out if len(rows) == count][-2:]
    assert torch.equal(first, second)
    assert len(first) == count
    trained = loss.batches[0]
    if isinstance(validation, torch.Tensor):
        assert torch.equal(first, validation)
        assert len(trained) == len(x)
    else:  # a partition of the data
        assert torch.equal(torch.cat([first, trained]).sort(0).values, x.sort(0).values)


def test_validation_bound_has_the_same_noise_at_every_call(x):
    pair = new(Latent)
    result = fit(pair, x, epochs=3, lr=1e-12, validation=5, batch_size=4)
    assert len({row["validation_bound"] for row in result.history}) == 1


def test_early_stopping_keeps_the_best_weights():
    """Full-batch gradient descent goes from 0 to the training mean 5, past the held-out mean 2."""
    x, held_out = torch.full((4, 1), 5.0), torch.full((2, 1), 2.0)
    path = [5 * (1 - 0.9**step) for step in range(100)]
    best = min(range(1, 100), key=lambda step: abs(path[step] - 2))
    pair = Location(1)
    options = {"lr": 0.1, "schedule": "constant", "optimizer": sgd, "validation": held_out}
    result = fit(pair, x, epochs=99, patience=3, **options)
    assert result.stopped_early
    assert "stopped early" in str(result)
    assert len(result.history) == best + 3
    assert pair.loc.item() == pytest.approx(path[best], rel=1e-5)
    bounds = [row["validation_bound"] for row in result.history]
    assert max(bounds) == bounds[best - 1]

    pair = Location(1)  # without patience the last weights stay
    assert not fit(pair, x, epochs=best + 3, **options).stopped_early
    assert pair.loc.item() == pytest.approx(path[best + 3], rel=1e-5)


def test_schedules_at_every_step():
    assert [SCHEDULES["constant"](share) for share in (0.0, 0.5, 0.99)] == [1.0, 1.0, 1.0]
    assert [SCHEDULES["cosine"](share) for share in (0.0, 0.5)] == pytest.approx([1.0, 0.5])
    assert SCHEDULES["cosine"](1 / 3) == pytest.approx(0.75)
    x = torch.zeros(4, 1)
    history = fit(Location(1), x, epochs=5, lr=0.3, schedule="cosine").history
    expected = [0.3 * 0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)]
    assert [row["lr"] for row in history] == pytest.approx(expected)
    assert {row["lr"] for row in fit(Location(1), x, epochs=3, lr=0.3, schedule="constant").history} == {0.3}


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 2980])
def test_burda_stages_begin_at_exact_epochs(steps_per_epoch):
    """Stage i lasts 3^i epochs at 10^(−i/7): of 3280 epochs, it begins at (3^i − 1) / 2."""
    starts = [(3**i - 1) // 2 for i in range(9)]
    total = 3280 * steps_per_epoch
    assert starts[-1] == 3280
    for stage, (start, end) in enumerate(pairwise(starts)):
        for step in (start * steps_per_epoch, end * steps_per_epoch - 1):
            assert SCHEDULES["burda"](step / total) == pytest.approx(10 ** (-stage / 7)), (stage, step)


def test_schedule_keeps_the_ratio_of_learning_rates():
    def two_groups(parameters):
        return torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.5}])

    x, pair = torch.full((4, 1), 1.0), Latent(1)
    used = []

    class Look(Trace_ELBO):
        def loss_and_grads(self, model, guide, x):
            used.append([group["lr"] for group in optimizers[0].param_groups])
            return super().loss_and_grads(model, guide, x)

    optimizers = []

    def make(parameters):
        optimizers.append(two_groups(parameters))
        return optimizers[0]

    fit(pair, x, loss=Look(), epochs=2, lr=0.2, optimizer=make)
    assert used == [pytest.approx([0.2, 0.1]), pytest.approx([0.1, 0.05])]


# Binarisation


def test_binarize_draws_anew_at_every_use():
    x = torch.full((40, 500), 0.3)
    loss = Recording()
    fit(pv.models.VAE(500, 2, hidden_dims=()), x, loss=loss, epochs=3, batch_size=40, binarize=True)
    first, second, third = loss.batches
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    values = torch.stack(loss.batches)
    assert ((values == 0) | (values == 1)).all()
    standard_error = math.sqrt(0.3 * 0.7 / values.numel())
    assert abs(values.mean().item() - 0.3) < NUM_SE * standard_error


def test_binarize_draws_held_out_pixels_once(grey):
    loss = Recording()
    fit(Latent(6), grey, loss=loss, epochs=2, batch_size=100, validation=8, binarize=True)
    first, second = [rows for rows in loss.held_out if len(rows) == 8][-2:]
    assert torch.equal(first, second)
    assert ((first == 0) | (first == 1)).all()


# DataLoader


@pytest.mark.parametrize("tuples", [False, True])
def test_data_loader_equals_in_memory_in_the_same_order(x, tuples):
    loss, pair = Recording(), Location()
    options = {"epochs": 3, "lr": 0.1}
    in_memory = fit(pair, x, loss=loss, batch_size=5, **options)

    class SameOrder:
        """The batches of the first run. Its first pass is the one that fit spends on checks."""

        passes = 0

        def __iter__(self):
            epoch = max(self.passes - 1, 0)
            self.passes += 1
            for batch in loss.batches[5 * epoch : 5 * epoch + 5]:
                yield [int((x == row).all(-1).nonzero()) for row in batch]

        def __len__(self):
            return 5

    data = TensorDataset(x, torch.arange(len(x))) if tuples else x
    other = Location()
    loaded = fit(other, DataLoader(data, batch_sampler=SameOrder()), **options)
    assert_same(weights(pair), weights(other))
    assert without_seconds(in_memory.history) == without_seconds(loaded.history)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"batch_size": 5}, 23),
        ({"batch_size": 5, "shuffle": True}, 23),
        ({"batch_size": 5, "drop_last": True}, 20),
        ({"batch_size": 5, "sampler": SubsetRandomSampler(range(12))}, 12),
        ({"batch_sampler": [[0, 1, 2], [3, 4]]}, 5),
        ({"batch_size": None}, 23),  # ready-made batches
    ],
)
def test_number_of_data_of_a_data_loader(x, options, size):
    """Local sites weigh dataset / batch against a global latent, for the data that an epoch goes through."""

    class Sizes(Recording):
        sizes = frozenset()

        def loss_and_grads(self, model, guide, x):
            (frame,) = pyro.poutine.trace(model).get_trace(x).nodes["x"]["cond_indep_stack"]
            self.sizes |= {frame.full_size}
            return super().loss_and_grads(model, guide, x)

    loss = Sizes()
    rows = [x[:10], x[10:]] if options == {"batch_size": None} else x
    fit(Location(), DataLoader(rows, **options), loss=loss, epochs=1)
    assert sum(map(len, loss.batches)) == size
    assert loss.sizes == {size}


# Resuming


def loader(rows):
    return DataLoader(rows, batch_size=5, shuffle=True)


def loader_with_generator(rows):
    return DataLoader(rows, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(5))


RESUMED = {
    "plain": (lambda rows: rows, {}),
    "validation and patience": (lambda rows: rows, {"validation": 6, "patience": 2}),
    "binarize": (lambda rows: rows, {"binarize": True, "validation": 6}),
    "DataLoader": (loader, {}),
    "DataLoader, binarize": (loader, {"binarize": True}),
    "DataLoader with its own generator": (loader_with_generator, {}),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [1, 4, 12, 24])  # in the first step; at an epoch's end; in the middle; near the end
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, grey, name, at):
    make, options = RESUMED[name]
    options = {"epochs": 5, "batch_size": 5, "lr": 0.05, **options}
    straight = new(lambda: Latent(6))
    expected = fit(straight, make(grey), loss=Interrupted(), **options)

    file = tmp_path / "checkpoint"
    broken = new(lambda: Latent(6))
    if at <= expected.steps:
        with pytest.raises(KeyboardInterrupt):
            fit(broken, make(grey), loss=Interrupted(at), checkpoint=file, **options)
        saved = load_state(file)
        assert_same(weights(broken), saved["pair"])  # what Ctrl-C leaves in the pair is what the file holds
    else:
        fit(broken, make(grey), loss=Interrupted(), checkpoint=file, **options)
    resumed = new(lambda: Latent(6), seed=99)
    result = fit(resumed, make(grey), loss=Interrupted(), checkpoint=file, resume=True, **options)
    assert_same(weights(straight), weights(resumed))
    assert without_seconds(expected.history) == without_seconds(result.history)
    assert (expected.steps, expected.stopped_early) == (result.steps, result.stopped_early)


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, though the suite may run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_training_where_python_drops_it(tmp_path, x, monkeypatch):
    """Python drops it in callbacks of weak references, such as those that every `import` has."""

    class Dropped(Interrupted):
        def loss_and_grads(self, model, guide, x):
            self.steps += 1
            if self.steps == self.at:
                thing = type("Thing", (), {})()
                reference = weakref.ref(thing, self.press)
                del thing, reference
                assert dropped == [KeyboardInterrupt]
            return Trace_ELBO.loss_and_grads(self, model, guide, x)

        @staticmethod
        def press(_):
            signal.raise_signal(signal.SIGINT)
            end = time.monotonic() + 10  # Python may come to handle it a little later
            while time.monotonic() < end:
                pass

    dropped = []
    monkeypatch.setattr("sys.unraisablehook", lambda event: dropped.append(event.exc_type))
    file, before = tmp_path / "checkpoint", signal.getsignal(signal.SIGINT)
    pair, resumed, straight = new(Latent), new(Latent), new(Latent)
    options = {"epochs": 3, "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        fit(pair, x, loss=Dropped(7), checkpoint=file, **options)
    assert signal.getsignal(signal.SIGINT) is before
    fit(resumed, x, loss=Dropped(), checkpoint=file, resume=True, **options)
    fit(straight, x, loss=Dropped(), **options)
    assert_same(weights(straight), weights(resumed))


def test_resuming_a_finished_run_changes_nothing(tmp_path, x):
    file, options = tmp_path / "checkpoint", {"epochs": 3, "batch_size": 5, "validation": 5, "patience": 3}
    pair, again = new(Latent), new(Latent, seed=1)
    first = fit(pair, x, checkpoint=file, **options)
    second = fit(again, x, checkpoint=file, resume=True, **options)
    assert_same(weights(pair), weights(again))
    assert first.history == second.history


def test_resume_does_not_initialize_again(tmp_path):
    x = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    file, options = tmp_path / "checkpoint", {"epochs": 4, "batch_size": 5}
    straight, broken, resumed = (new(lambda: pv.models.VAE(6, 2, hidden_dims=(4,))) for _ in range(3))
    fit(straight, x, loss=Interrupted(), **options)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, x, loss=Interrupted(7), checkpoint=file, **options)
    fit(resumed, x, loss=Interrupted(), checkpoint=file, resume=True, **options)
    assert_same(weights(straight), weights(resumed))


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 4},
        {"batch_size": 6},
        {"lr": 0.2},
        {"schedule": "constant"},
        {"seed": 1},
        {"validation": 5},
        {"patience": 2},
        {"loss": "RenyiELBO"},
        {"optimizer": sgd},
        {"x": torch.zeros(24, 2)},
        {"pair": Location},
        {"pair": lambda: WideLatent()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_resume_with_other_options_is_refused(tmp_path, x, other):
    file = tmp_path / "checkpoint"
    options = {"x": x, "epochs": 3, "batch_size": 5, "lr": 0.1, "validation": 4, "patience": 1}
    fit(new(Latent), checkpoint=file, **options)
    written = file.read_bytes()
    options |= other
    pair = options.pop("pair", Latent)()
    before = weights(pair)
    with pytest.raises(ValueError, match=r"(?s)resume: .*Resume with"):
        fit(pair, checkpoint=file, resume=True, **options)
    assert_same(before, weights(pair))
    assert file.read_bytes() == written


def test_resume_with_more_epochs_says_how_to_train_longer(tmp_path, x):
    file, pair = tmp_path / "checkpoint", new(Latent)
    fit(pair, x, epochs=2, checkpoint=file)
    longer = "start a new fit from its weights, with initialize=False and another checkpoint"
    with pytest.raises(
        ValueError, match=rf"^resume: .*epochs 2, and these options make it 3\..*To train longer, .*{longer}"
    ):
        fit(new(Latent), x, epochs=3, checkpoint=file, resume=True)
    with pytest.raises(ValueError, match=r"make it 1\. Resume with everything that the run was started with\.$"):
        fit(new(Latent), x, epochs=1, checkpoint=file, resume=True)


class WideLatent(Latent):
    """Another shape under a name of its own."""

    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.zeros(3))


def test_a_checkpoint_is_not_replaced_unasked(tmp_path, x):
    file, pair = tmp_path / "checkpoint", new(Latent)
    fit(pair, x, epochs=2, checkpoint=file)
    written, before, other = file.read_bytes(), weights(pair), new(Latent, seed=1)
    message = r"^checkpoint: expected a new file; \S+ exists\. .*resume=True, or delete or rename it\.$"
    for data in (x, None):  # before the data are looked at
        with pytest.raises(FileExistsError, match=message):
            fit(other, data, epochs=2, checkpoint=file)
    with pytest.raises(FileExistsError, match=message):
        fit(other, x, epochs=2, checkpoint=file, on_start=lambda threads: None)
    assert file.read_bytes() == written
    assert_same(weights(other), weights(new(Latent, seed=1)))
    fit(other, x, epochs=2, checkpoint=file, resume=True)
    assert_same(before, weights(other))
    fit(new(Latent), x, epochs=2, checkpoint=file, on_start=lambda threads: file.unlink())  # whoever clears it means it
    assert load_state(file)["epoch"] == 2


def test_resume_from_a_file_that_is_no_training_state(tmp_path, x):
    file = tmp_path / "checkpoint"
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: expected a checkpoint, found none at .*checkpoint"):
        fit(Location(), x, checkpoint=file, resume=True)
    save_state(file, {"anything": 1})
    with pytest.raises(ValueError, match="no training state"):
        fit(Location(), x, checkpoint=file, resume=True)
    file.write_bytes(b"\x80\x04 not this")
    with pytest.raises(ValueError, match=r"^checkpoint: \S+ is damaged"):
        fit(Location(), x, checkpoint=file, resume=True)


def test_interrupt_without_checkpoint_leaves_the_last_whole_epoch(x):
    straight, broken = Location(), Location()
    fit(straight, x, loss=(seen := Interrupted()), epochs=4, batch_size=23, schedule="constant")
    assert seen.steps == 4
    with pytest.raises(KeyboardInterrupt):
        fit(broken, x, loss=Interrupted(4), epochs=4, batch_size=23, schedule="constant")
    third = Location()
    fit(third, x, epochs=3, batch_size=23, schedule="constant")
    assert_same(weights(broken), weights(third))


# Divergence


class Countdown(pv.Pair):
    """Its loss per datum is ``a``, so that SGD at lr 1 takes 1 off it a step; below 0 the site ``bad`` is NaN."""

    data_dim = 2

    def __init__(self, start, only_gradient=False):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(start)))
        self.bystander = nn.Parameter(torch.tensor(1.0))
        self.only_gradient = only_gradient

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("fine", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)
            if self.only_gradient:  # at a = 0 its value is 0 and its gradient 0 · ∞
                pyro.factor("bad", -self.a + 0.0 * self.a.abs().sqrt().expand(len(x)))
            else:
                pyro.factor("bad", torch.where(self.a < 0, math.nan, -self.a).expand(len(x)))


@pytest.mark.parametrize("use_loader", [False, True])
def test_nan_loss_names_step_and_site_and_keeps_the_last_good_weights(tmp_path, use_loader):
    """3.5, 2.5, 1.5, 0.5, −0.5: the fifth step, which is the second of the second epoch, has no loss."""
    x, pair = torch.zeros(9, 2), Countdown(3.5)
    data = DataLoader(x, batch_size=3) if use_loader else x
    file = tmp_path / "checkpoint"
    options = {"lr": 1.0, "schedule": "constant", "optimizer": sgd}
    with pytest.raises(TrainingDiverged, match=r"loss turned NaN.* step 5 \(epoch 2\) at site 'bad'.*lr"):
        fit(pair, data, epochs=4, batch_size=3, checkpoint=file, **options)
    assert pair.a.item() == 0.5  # the last weights that gave a finite loss
    assert pair.bystander.item() == 1.0
    assert load_state(file)["pair"]["a"].item() == 0.5  # the last whole epoch, to resume from


def test_nan_in_the_gradient_alone_names_the_parameter():
    pair = Countdown(2.0, only_gradient=True)
    with pytest.raises(TrainingDiverged, match=r"gradient turned NaN.* step 3 \(epoch 1\).*'a'"):
        fit(
            pair,
            torch.zeros(9, 2),
            epochs=2,
            batch_size=2,
            lr=1.0,
            schedule="constant",
            optimizer=sgd,
        )
    assert pair.a.item() == 0.0


def test_divergence_in_the_last_step_of_the_last_epoch():
    pair = Countdown(1.0, only_gradient=True)
    with pytest.raises(TrainingDiverged, match="step 2"):
        fit(pair, torch.zeros(2, 2), epochs=2, lr=1.0, schedule="constant", optimizer=sgd)
    assert pair.a.item() == 0.0


# The objective with a global latent


def test_global_latent_every_step_is_the_stated_objective(x):
    """Against the loss written out, with the same noise: (N/B · Σ_batch log p(x | μ) + log p(μ) − log q(μ)) / N."""
    rows = x[:, :1]

    class SameNoise(Recording):
        def loss_and_grads(self, model, guide, x):
            torch.manual_seed(100 + len(self.batches))
            return super().loss_and_grads(model, guide, x)

    loss, pair = SameNoise(), GlobalMean()
    row = fit(pair, rows, loss=loss, epochs=1, batch_size=5, lr=0.3, schedule="constant", optimizer=sgd).history[0]

    loc, log_scale = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    total = 0.0
    for step, batch in enumerate(loss.batches):
        torch.manual_seed(100 + step)
        guide = torch.distributions.Normal(loc, log_scale.exp())
        mu = loc + log_scale.exp() * torch.randn(())
        data = torch.distributions.Normal(mu, 1.0).log_prob(batch).sum() * len(rows) / len(batch)
        bound = (data + torch.distributions.Normal(0.0, 3.0).log_prob(mu) - guide.log_prob(mu)) / len(rows)
        total += bound.item() * len(batch)
        gradient = torch.autograd.grad(bound, (loc, log_scale))
        with torch.no_grad():
            for parameter, slope in zip((loc, log_scale), gradient, strict=True):
                parameter += 0.3 * slope
    assert row["train_bound"] == pytest.approx(total / len(rows), rel=1e-5)
    torch.testing.assert_close(pair.loc, loc, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair.log_scale, log_scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "batch_size", "epochs"),
    [("Trace_ELBO", 20, 300), ("TraceMeanField_ELBO", 20, 300), ("RenyiELBO", 100, 600)],
)
def test_global_latent_recovers_the_exact_posterior(loss, batch_size, epochs):
    """KL(q ‖ posterior) is the evidence less the bound. Without the factor N/B it would be 1.2 nats.

    RenyiELBO gets all the data at once: with a global latent, its logarithm of a mini-batch's weights is no bound.
    """
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) + 1.0
    pair = GlobalMean()
    result = fit(pair, x, loss=loss, epochs=epochs, batch_size=batch_size, lr=0.1)
    variance = 1 / (len(x) + 1 / 9)
    posterior = torch.distributions.Normal(x.sum() * variance, math.sqrt(variance))
    guide = torch.distributions.Normal(pair.loc, pair.log_scale.exp())
    assert torch.distributions.kl_divergence(guide, posterior).item() < 0.05

    # log p(x) = log p(x | μ) + log p(μ) − log p(μ | x) at any μ
    mu = torch.tensor(1.0)
    evidence = torch.distributions.Normal(mu, 1.0).log_prob(x).sum()
    evidence += torch.distributions.Normal(0.0, 3.0).log_prob(mu) - posterior.log_prob(mu)
    tail = [row["train_bound"] for row in result.history[-20:]]
    mean, spread = sum(tail) / 20, torch.tensor(tail).std().item()
    # the bound is below the evidence by KL / N; the mean of 20 epochs has this Monte Carlo error
    assert abs(mean - float(evidence) / len(x)) < 0.05 / len(x) + NUM_SE * spread / math.sqrt(20)


# Kinds of pairs and data


def test_function_pair(x):
    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pair = pv.FunctionPair(model, lambda x: None)
    fit(pair, x, epochs=1, batch_size=100, lr=1.0, optimizer=sgd)
    torch.testing.assert_close(pair.params["loc"].detach(), x.mean(0))
    assert len(pyro.get_param_store()) == 0


def test_double_pair_takes_float_data(x):
    pair = Latent().double()
    result = fit(pair, x, epochs=2, validation=4)
    assert pair.loc.dtype == torch.float64
    assert math.isfinite(result.history[-1]["validation_bound"])
    for rows in (DataLoader(x, batch_size=5), x.double()):
        fit(Latent().double(), rows, epochs=1)
    binary = DataLoader((x > 0).float(), batch_size=5)
    fit(pv.models.VAE(2, 2, hidden_dims=(4,)).double(), binary, epochs=1)


def test_double_data_and_arrays(x):
    pairs = [Location() for _ in range(3)]
    for pair, data in zip(pairs, (x, x.double(), x.numpy()), strict=True):
        fit(pair, data, epochs=1)
    assert_same(weights(pairs[0]), weights(pairs[1]))
    assert_same(weights(pairs[0]), weights(pairs[2]))


def test_frozen_parameters_stay(x):
    pair = new(Latent)
    pair.encode.requires_grad_(False)
    before = weights(pair)
    fit(pair, x, epochs=1)
    after = weights(pair)
    assert torch.equal(before["encode.weight"], after["encode.weight"])
    assert not torch.equal(before["loc"], after["loc"])


def test_initialize_can_be_left_out():
    x = torch.ones(8, 3)
    pair = pv.models.VAE(3, 2, hidden_dims=())
    fit(pair, x, epochs=1, lr=1e-12, initialize=False)
    assert pair.decoder.output.bias.abs().max() < 1e-6
    fit(pair, x, epochs=1, lr=1e-12)
    assert pair.decoder.output.bias.min() > 3


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("loss", list(LOSSES))
def test_losses_by_name_by_object_and_pyro_s_own(x, loss):
    named, made, stock = (new(Latent) for _ in range(3))
    fit(named, x, loss=loss, epochs=2, batch_size=5)
    fit(made, x, loss=LOSSES[loss](), epochs=2, batch_size=5)
    assert_same(weights(named), weights(made))
    if loss == "Trace_ELBO":
        fit(stock, x, loss=pyro.infer.Trace_ELBO(), epochs=2, batch_size=5)
        for name, value in weights(stock).items():
            torch.testing.assert_close(value, weights(named)[name])


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert fit(Location(), torch.zeros(3, 2), epochs=1, device="cpu").device == "cpu"


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"^device: 'cuda:2' was asked for, and the last that torch sees is 'cuda:1'"):
        pick_device("cuda:2")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_cuda_gives_the_numbers_of_the_cpu(tmp_path, x, home):
    """A pair is trained on the GPU, returns to the device it came from, and has the CPU's numbers, resumed too."""
    pair, on_cpu, resumed = (Location().to(home) for _ in range(3))
    options = {"epochs": 4, "batch_size": 100, "lr": 0.1, "validation": 5}
    result = fit(pair, x, device="cuda", loss=Interrupted(), **options)
    assert result.device.startswith("cuda")
    assert pair.loc.device.type == home
    expected = fit(on_cpu, x, device="cpu", **options)
    torch.testing.assert_close(pair.loc, on_cpu.loc)
    assert result.history[-1]["train_bound"] == pytest.approx(expected.history[-1]["train_bound"], rel=1e-5)
    file = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, x, device="cuda", loss=Interrupted(3), checkpoint=file, **options)
    fit(resumed, x, device="cuda", loss=Interrupted(), checkpoint=file, resume=True, **options)
    assert_same(weights(pair), weights(resumed))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_divergence_is_named():
    pair = Countdown(3.5)
    with pytest.raises(TrainingDiverged, match="step 5"):
        fit(pair, torch.zeros(9, 2), epochs=4, batch_size=3, lr=1.0, schedule="constant", optimizer=sgd)
    assert pair.a.item() == 0.5


# Bad calls


class MissedSite(Latent):
    def guide(self, x):
        pass


class ExtraSite(Latent):
    def guide(self, x):
        super().guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))


class BareParameter(Location):
    def model(self, x):
        loc = pyro.param("bare", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + self.loc, 1.0).to_event(1), obs=x)


class NoParameters(pv.Pair):
    data_dim = 2

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(4, 2))


def make_binary():
    return pv.models.VAE(2, 2, hidden_dims=(3,))


def make_mixture():
    return pv.models.GMM(2, 2)


def refuse(parameters):
    raise ValueError("optimizer: no")


good = torch.zeros(8, 2)
BAD = {
    "NaN": (Latent, {"x": torch.tensor([[0.0, 1.0], [math.nan, 0.0]])}, ValueError, "x: .*finite.*row 1, col"),
    "infinite": (Latent, {"x": torch.tensor([[0.0, math.inf], [0.0, 0.0]])}, ValueError, "x: .*row 0, column 1"),
    "empty": (Latent, {"x": torch.zeros(0, 2)}, ValueError, "x: .*at least one datum"),
    "one datum": (Latent, {"x": torch.zeros(1, 2)}, ValueError, "x: .*at least 2 data; got 1"),
    "rank 1": (Latent, {"x": torch.zeros(8)}, ValueError, r"x: .*\(N, D\).*reshape"),
    "rank 3": (Latent, {"x": torch.zeros(8, 2, 1)}, ValueError, r"x: .*\(N, D\).*\(8, 2, 1\)"),
    "features": (Latent, {"x": torch.zeros(8, 3)}, ValueError, "x: expected 2 features.*got 3"),
    "integers": (Latent, {"x": torch.zeros(8, 2).long()}, TypeError, r"x: .*torch.int64.*x.float\(\)"),
    "bytes": (Latent, {"x": torch.zeros(8, 2).byte()}, TypeError, "x: .*divide pixels of 0..255 by 255"),
    "a list of words": (Latent, {"x": ["a", "b"]}, TypeError, "x: expected a floating-point tensor"),
    "None": (Latent, {"x": None}, TypeError, "x: expected a floating-point tensor"),
    "grey": (make_binary, {"x": good + 0.5}, ValueError, "x: .*site 'x'.*grey pixels.*binarize=True"),
    "not pixels": (make_binary, {"x": good - 1}, ValueError, "x: expected values in the support of site 'x'"),
    "binarize": (make_binary, {"x": good + 2, "binarize": True}, ValueError, r"binarize: .*\[0, 1\].*from 2 to 2"),
    "grey held out": (make_binary, {"validation": good + 0.5}, ValueError, "validation: .*grey pixels"),
    "held out NaN": (Latent, {"validation": good / 0}, ValueError, "validation: .*finite"),
    "held out features": (Latent, {"validation": torch.zeros(3, 5)}, ValueError, "validation: expected 2 feat"),
    "share": (Latent, {"validation": 1.5}, ValueError, "validation: expected a share between 0 and 1"),
    "count": (Latent, {"validation": 8}, ValueError, "validation: .*count below the 8 data; got 8"),
    "negative": (Latent, {"validation": -0.1}, ValueError, "validation: expected a share"),
    "no share": (Latent, {"validation": "some"}, TypeError, "validation: expected a share"),
    "epochs 0": (Latent, {"epochs": 0}, ValueError, "epochs: expected a whole number, 1 or more; got 0"),
    "epochs 1.5": (Latent, {"epochs": 1.5}, TypeError, "epochs: expected a whole number"),
    "batch_size": (Latent, {"batch_size": -1}, ValueError, "batch_size: .*got -1"),
    "lr 0": (Latent, {"lr": 0.0}, ValueError, "lr: expected a number above 0; got 0"),
    "lr NaN": (Latent, {"lr": math.nan}, ValueError, "lr: expected a number above 0; got nan"),
    "lr infinite": (Latent, {"lr": math.inf}, ValueError, "lr: expected a number above 0"),
    "lr word": (Latent, {"lr": "1e-3"}, TypeError, "lr: expected a number above 0; got '1e-3'"),
    "loss": (Latent, {"loss": "Trace_ELBOW"}, ValueError, "loss: .*Did you mean 'Trace_ELBO'"),
    "no loss": (Latent, {"loss": 3}, TypeError, r"loss: expected a loss such as Trace_ELBO\(\)"),
    "a loss class": (Latent, {"loss": Trace_ELBO}, TypeError, r"loss: expected a loss such as Trace_ELBO\(\)"),
    "schedule": (Latent, {"schedule": "cosin"}, ValueError, "schedule: .*Did you mean 'cosine'"),
    "device": (Latent, {"device": "gpu"}, ValueError, "device: expected 'auto', 'cpu' or 'cuda'.*'gpu'"),
    "meta": (Latent, {"device": "meta"}, ValueError, "device: expected 'auto', 'cpu' or 'cuda'.*'meta'"),
    "patience": (Latent, {"patience": 3}, ValueError, r"patience: .*validation=0\.1"),
    "patience 0": (Latent, {"patience": 0, "validation": 2}, ValueError, "patience: .*1 or more"),
    "resume": (Latent, {"checkpoint": None, "resume": True}, ValueError, "resume: expected checkpoint="),
    "missed site": (MissedSite, {}, ValueError, "guide: the model samples site 'z' and the guide does not"),
    "extra site": (ExtraSite, {}, ValueError, "guide: it samples site 'extra', which the model lacks"),
    "bare param": (BareParameter, {}, ValueError, r"pair: pyro.param\('bare'\).*FunctionPair"),
    "no pair": (lambda: nn.Linear(2, 2), {}, TypeError, "pair: expected a pyrovae.Pair; got Linear.*FunctionPair"),
    "no parameters": (NoParameters, {}, ValueError, "pair: NoParameters has no parameters to train"),
    "loss of another kind": (make_mixture, {"loss": "Trace_ELBO"}, ValueError, "site 'z'.*TraceEnum_ELBO"),
    "optimizer": (make_binary, {"optimizer": refuse}, ValueError, "optimizer: no"),
    "optimizer object": (
        make_binary,
        {"optimizer": torch.optim.SGD([torch.zeros(1)])},
        TypeError,
        "optimizer: expected a function that makes a torch.optim",
    ),
    "empty loader": (Latent, {"x": DataLoader(torch.zeros(0, 2))}, ValueError, "x: .*the DataLoader is empty"),
    "loader of words": (Latent, {"x": DataLoader(["a", "b"])}, TypeError, "x: expected the DataLoader to yield"),
    "loader NaN": (Latent, {"x": DataLoader(good / 0)}, ValueError, "x: .*finite"),
    "loader features": (Latent, {"x": DataLoader(torch.zeros(4, 5))}, ValueError, "x: expected 2 features"),
    "loader of a stream": (Latent, {"x": DataLoader(Stream())}, ValueError, "x: .*with a length"),
    "loader and share": (Latent, {"x": DataLoader(good), "validation": 0.1}, ValueError, "validation: .*DataLoader"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_before_anything_happens(tmp_path, name):
    make, options, exception, match = BAD[name]
    pair, file = make(), tmp_path / "checkpoint"
    before, random = weights(pair), torch.get_rng_state()
    options = {"x": good, "checkpoint": file, "epochs": 1} | options
    try:
        with pytest.raises(exception, match=match):
            fit(pair, **options)
    finally:
        pyro.clear_param_store()
    assert_same(before, weights(pair))
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_for_the_checkpoint(tmp_path):
    pair = Location()
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*folder"):
        fit(pair, good + 1, epochs=1, checkpoint=tmp_path / "absent" / "checkpoint")
    assert torch.equal(pair.loc, torch.zeros(2))


class Plates(pv.Pair):
    """Sites inside one plate or another, or none."""

    def __init__(self, z="data", x="data", guide="data"):
        super().__init__()
        self.z, self.x, self.of_guide = z, x, guide
        self.loc = torch.nn.Parameter(torch.zeros(2))

    def model(self, x):
        with pyro.plate("features", 2):  # as many as the rows that the check looks at
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        plates = {name: self.plate(name, x) for name in {self.z, self.x}}
        with plates[self.z]:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1 if self.z else 2))
        with plates[self.x]:
            pyro.sample("x", dist.Normal(z + loc, 1.0).to_event(1 if self.x else 2), obs=x)

    def guide(self, x):
        with pyro.plate("features", 2):
            pyro.sample("loc", dist.Normal(self.loc, 1.0))
        with self.plate(self.of_guide, x):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1 if self.of_guide else 2))

    def plate(self, name, x):
        return pyro.plate(name, len(x), dim=-1) if name else nullcontext()


class Layers(pv.Pair):
    """Linear maps of any sizes, right or wrong."""

    def __init__(self, features=6, latent=2, drawn=6):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(features, 2), torch.nn.Linear(latent, drawn)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("sizes", "error", "program"),
    [
        ({"features": 5}, RuntimeError, "guide"),
        ({"latent": 3}, RuntimeError, "model"),
        ({"drawn": 5}, ValueError, "guide and the model"),  # that x and its distribution differ shows in log_prob
    ],
)
def test_an_error_in_the_first_run_names_the_program_and_its_rows(sizes, error, program):
    """The caller passed no batch of two rows, so the note explains a shape that begins with 2."""
    x = torch.randn(9, 6)
    fit(Layers(), x, epochs=1)
    for call in (fit, pv.evaluate):
        with pytest.raises(error) as caught:
            call(Layers(**sizes), x)
        note = f"while running the {program} on 2 rows of x, shape (2, 6), as a first look at the pair"
        assert caught.value.__notes__ == [note]
    with pytest.raises(error) as caught:
        pv.evaluate(Layers(**sizes), x[:1])
    assert "on 1 row of x, shape (1, 6)" in caught.value.__notes__[0]


def test_what_follows_the_batch_is_inside_the_plate_data(x):
    """Objectives weigh mini-batches by this plate. Without the check, another objective would be trained silently."""
    fit(Plates(), x, epochs=1)
    named = r"pair: expected the plate over the batch to be named 'data'.*found 'batch'\. Write `with pyro\.plate"
    wrong = {
        ("batch", "batch", "batch"): named,
        ("data", "data", "batch"): named,
        ("batch", "data", "batch"): named,
        ("data", "batch", "data"): named,
        ("data", "data", None): r"guide: expected site 'z' inside the plate 'data', as in the model",
        (None, "data", "data"): r"model: expected site 'z' inside the plate 'data', as in the guide",
        ("data", None, "data"): r"model: expected site 'x', which observes the batch, inside the plate 'data'",
    }
    for names, match in wrong.items():
        with pytest.raises(ValueError, match=match):
            fit(Plates(*names), x)
        with pytest.raises(ValueError, match=match):
            pv.evaluate(Plates(*names), x)


def test_defaults_suit_the_pair():
    """50 epochs or 2,000 steps; a pair's own learning rate; an optimizer's own, unless one is given."""
    rows = torch.randn(300, 2)
    result = fit(pv.models.GMM(2, 2), rows, batch_size=100, schedule="constant")
    assert result.steps == 2001
    assert result.history[-1]["lr"] == pv.models.GMM.default_lr == 0.02
    assert fit(Location(), rows, batch_size=100, epochs=1).history[-1]["lr"] < pv.Pair.default_lr
    for lr, used in ((None, 1.0), (0.25, 0.25)):
        row = fit(Location(), rows, epochs=1, lr=lr, schedule="constant", optimizer=sgd).history[0]
        assert row["lr"] == used


@pytest.mark.parametrize(
    ("pair", "data", "message"),
    [
        (pv.models.VAE, torch.zeros(3, 2), "got the class VAE. Call it"),
        (pv.models.VAE(64), pv.data.load("digits"), "got a data set. Pass its rows: x.train"),
    ],
)
def test_a_wrong_argument_is_named(pair, data, message):
    with pytest.raises(TypeError, match=message):
        fit(pair, data)


def test_a_pyro_optimizer_is_refused(x):
    with pytest.raises(TypeError, match=r"optimizer: .*got PyroOptim"):
        fit(Location(), x, optimizer=pyro.optim.Adam({"lr": 0.1}))


def test_numpy_numbers_are_accepted(x):
    np = pytest.importorskip("numpy")
    assert fit(Location(), x, epochs=np.int64(2), batch_size=np.int32(5), lr=np.float32(0.1)).steps > 2
    assert pv.models.GMM(np.int64(2), 2).num_components == 2


# A monitor


def test_monitor_joins_the_history_and_changes_nothing(x, tmp_path):
    def monitor(epoch):
        torch.rand(100)  # draws of its own
        return {"twice": 2 * epoch} if epoch != 2 else {}

    plain, watched = Latent(), Latent()
    watched.load_state_dict(plain.state_dict())
    expected = fit(plain, x, epochs=4)
    result = fit(watched, x, epochs=4, monitor=monitor, checkpoint=tmp_path / "c")
    assert [row.get("twice") for row in result.history] == [2.0, None, 6.0, 8.0]
    assert [row["train_bound"] for row in result.history] == [row["train_bound"] for row in expected.history]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    again = fit(Latent(), x, epochs=4, monitor=monitor, checkpoint=tmp_path / "c", resume=True)
    assert again.history == result.history


def test_time_of_the_monitor_does_not_count(x):
    def slow(epoch):
        time.sleep(0.5)
        return {}

    assert fit(Latent(), x, epochs=2, monitor=slow).seconds < 0.5
