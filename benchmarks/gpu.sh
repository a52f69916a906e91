#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in under ten minutes: the tests marked gpu, the
# benchmarks, a profile. Writes all under an output folder; what fails is noted, and the rest runs.
#
#   benchmarks/gpu.sh OUT [WHEELS]
#
# WHEELS: a folder of wheels for what this machine lacks and can't download. The Python in $PYTHON
# (else python3) must have torch. With DRY_RUN=1 tiny sizes run, on a CPU too.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT [WHEELS]}
wheels=${2:-}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
export MASKDM_CACHE=${MASKDM_CACHE:-$out/cache}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor}
failed=()

# Runs a step within its time, its output into a file.
step() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    if ! (cd "$root" && timeout "$seconds" "$@") >"$out/$name.txt" 2>&1; then
        failed+=("$name")
        tail -n 5 "$out/$name.txt"
    fi
    echo "   $((SECONDS - start)) s"
}

if [ -n "$wheels" ]; then
    step install 120 "$python" -m pip install --quiet --no-index --no-deps \
        --break-system-packages "$wheels"/*.whl
fi
step environment 60 "$python" -c "
import json, platform, torch
from importlib import metadata
names = ('torch', 'accelerate', 'diffusers', 'numpy')
facts = {name: metadata.version(name) for name in names}
facts |= {'python': platform.python_version(), 'gpu': None}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    facts |= {'gpu': properties.name, 'memory_gib': round(properties.total_memory / 2**30, 1)}
    facts |= {'cuda': torch.version.cuda}
print(json.dumps(facts, indent=1))
"
if [ -n "${DRY_RUN:-}" ]; then
    step tests 120 "$python" -m pytest -q -m gpu --collect-only tests
    step benchmarks 400 "$python" benchmarks/run.py --try --out "$out/benchmarks.jsonl"
    step profile 120 "$python" benchmarks/profile_step.py --model tiny --batch-size 2 --num 1
else
    step tests 240 "$python" -m pytest -q -m gpu tests
    step benchmarks 270 "$python" benchmarks/run.py --full --limit-sec 260 \
        --out "$out/benchmarks.jsonl"
    step profile 60 "$python" benchmarks/profile_step.py --batch-size 256 --how compiled --num 10
fi
rm -rf "$out/cache"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" | tee "$out/failed.txt"
    exit 1
fi
echo "all done in $SECONDS s: $out"
