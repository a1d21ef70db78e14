#!/bin/sh
# make_venv.sh VENV CONSTRAINTS EXTRAS: an environment with the project installed, pinned. With
# NO_COMPILE=1 modules are compiled when they are imported, which installs in half the time; where
# compiled modules are not to be written, each process would then compile torch again.
set -eu
venv=$1
constraints=$2
extras=$3
python=${PYTHON:-python3}

"$python" - <<'CHECK'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Slipstream needs Python 3.11 or later; this is {sys.version.split()[0]}. "
             "Choose another with: make PYTHON=python3.12 ...")
CHECK

if [ ! -x "$venv/bin/python" ]; then
    # Debian ships Python without ensurepip unless python3-venv is installed.
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "Creating $venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        ${NO_COMPILE:+--no-compile} --constraint "$constraints" "$@"
}

# torch first and alone: with it pinned and present, nothing later pulls another build. What it needs
# is pinned too, or would be installed a second time.
install "$(grep '^torch==' "$constraints")"
install --editable ".[$extras]"
