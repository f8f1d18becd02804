"""What ``import ecjax`` brings, and what waits until it is asked for."""

import subprocess
import sys

CODE = """
import sys
import ecjax

late = {"scipy", "matplotlib", "safetensors", "ecjax.compact"}
assert not late & set(sys.modules), late & set(sys.modules)
assert "compact" in dir(ecjax)
assert callable(ecjax.compact.compact)
from ecjax import compact
from ecjax import *
assert compact is ecjax.compact is sys.modules["ecjax.compact"]
try:
    ecjax.compress
except AttributeError as error:
    assert str(error) == "module 'ecjax' has no attribute 'compress'"
else:
    raise AssertionError
"""


def test_what_takes_long_to_import_is_imported_when_it_is_asked_for():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
