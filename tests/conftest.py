import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Most of the time goes into compiling: what one process of a run has compiled, the others read. Set before JAX is
# imported, and inherited by workers, subprocesses and notebooks.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ecjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # of LLVM; what is compiled here runs once or twice
# An emitter that takes half of the time to compile; later versions know no such flag, and end where they are given one.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU, if there is one

import hypothesis
import jax
import jaxtyping
import pytest

# Eight devices on any machine, for the tests of what is spread over several. All else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("ecjax", deadline=None, max_examples=10, derandomize=True)
hypothesis.settings.load_profile("ecjax")


@pytest.fixture(scope="module")
def float64():
    """Runs a whole module in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_of_one_module():
    """What a module has compiled is let go of after it.

    Each compiled function maps memory, and XLA aborts where a process has as many maps as Linux allows it (65,530).
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def compiled_functions_of_a_slow_test(request):
    """Those of a slow test are many; what comes back from the cache on disk is soon there."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@pytest.fixture
def without_checked_types():
    """Annotations are not looked at, as where ecjax is used."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """Counts XLA compilations: call it for the number so far."""
    events = []

    def note(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield lambda: len(events)
    jax.monitoring.clear_event_listeners()
