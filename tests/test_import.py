"""``import pyrovae`` loads little, is fast, and changes no setting of the process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

HEAVY = ("matplotlib", "arviz", "sklearn", "pandas", "xarray", "typer", "pooch", "PIL", "IPython")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_no_heavy_library():
    """Of scipy it loads only what Pyro loads."""
    loaded = run(
        "import json, sys, pyro; a = set(sys.modules); import pyrovae; print(json.dumps([*{*sys.modules} - a]))"
    )
    roots = {name.split(".")[0] for name in loaded}
    assert roots.isdisjoint({*HEAVY, "scipy"})


def test_loading_digits_does_not_import_scikit_learn():
    """Importing scikit-learn takes most of a second, before any training starts."""
    loaded = run("import json, sys, pyrovae; pyrovae.data.load('digits'); print(json.dumps([*sys.modules]))")
    assert "sklearn" not in loaded


SECONDS = """
import json, time
import pyro
start = time.perf_counter()
import pyrovae
print(json.dumps(time.perf_counter() - start))
"""


def test_import_takes_at_most_0_3_seconds_more_than_that_of_pyro():
    run(SECONDS)  # the files are in memory now, and compiled
    for _ in range(2):  # again, if the machine was busy
        seconds = statistics.median(run(SECONDS) for _ in range(3))
        if seconds <= 0.3:
            return
    raise AssertionError(f"import pyrovae takes {seconds:.2f} s after import pyro")


SETTINGS = """
import json, os, random, signal, sys, warnings
import numpy, pyro, torch

def settings():
    return [
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.distributions.Distribution._validate_args,
        torch.get_rng_state().tolist(),
        str(numpy.random.get_state()),
        hash(random.getstate()),
        str(pyro.settings.get()),
        len(pyro.get_param_store()),
        str(warnings.filters),
        dict(os.environ),
        str(signal.getsignal(signal.SIGINT)),
        str(sys.excepthook),
        sys.path,
    ]

before = settings()
import pyrovae
after = settings()
print(json.dumps([i for i, (a, b) in enumerate(zip(before, after)) if a != b]))
"""


def test_import_changes_no_setting_of_the_process():
    assert run(SETTINGS) == []


def test_every_public_name_exists():
    import pyrovae

    for name in pyrovae.__all__:
        assert getattr(pyrovae, name) is not None
    for name in ("data", "evaluate", "fit", "fit_em", "log_weights", "models", "Pair"):
        assert name in pyrovae.__all__
