#!/usr/bin/env bash
# Run the tests with the oldest versions that settings.ini allows, on the oldest Python.
# PYTHON names the interpreter; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.10}
oldest=$(sed -n 's/^requirements = //p' settings.ini | sed 's/>=/==/g')
echo "oldest: $oldest"
"$python" -m venv .venv-oldest
# shellcheck disable=SC2086  # one word a requirement
.venv-oldest/bin/pip install -q $oldest pytest hypothesis mpmath
.venv-oldest/bin/pip install -q --no-deps .
.venv-oldest/bin/python -m pytest -q tests -p no:cacheprovider "$@"
