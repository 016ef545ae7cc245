# Sourced by run.sh on a machine without a network: Python packages from .te/, compile caches, the C++ extension.
#
# .te/ (an ignored folder) holds what the machine's own Python lacks: a bundle of Transformer Engine 2.11.0 as te-*.xz (a
# tar with te_site/ and its te_env.sh), the megatron-core 0.16.1 wheel, and any other wheels, pure Python or for its version.
set -euo pipefail
export PYTHONUNBUFFERED=1 PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu}
export TORCHINDUCTOR_CACHE_DIR=$HOME/.cache/inductor TRITON_CACHE_DIR=$HOME/.cache/triton
export NVTE_DEBUG=${NVTE_DEBUG:-0} NVTE_DEBUG_LEVEL=${NVTE_DEBUG_LEVEL:-0} # 1 and 2: which attention backend was chosen
mkdir -p "$OUT"
site=$HOME/te_site wheels=$HOME/gpu_wheels

if compgen -G '.te/te-*.xz' >/dev/null && [ ! -d "$site" ]; then
  "$PYTHON" -c "import tarfile, glob, os; tarfile.open(glob.glob('.te/te-*.xz')[0]).extractall(os.environ['HOME'], filter='tar')"
fi
if compgen -G '.te/*.whl' >/dev/null && [ ! -d "$wheels" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$wheels" .te/*.whl
fi
if [ -f "$site/te_env.sh" ]; then
  set +u
  . "$site/te_env.sh"
  set -u
fi
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$wheels:$PWD
if ! "$PYTHON" -c 'import megatron_smol._csrc' 2>/dev/null; then
  "$PYTHON" setup.py -q build_ext --inplace || echo 'note: the C++ data order was not built; benches on random tokens do without'
fi
