#!/usr/bin/env bash
# What nobody has run yet, on a machine with a GPU: benchmarks/gpu.sh [FOLDER]. It prints nothing but where it is; gpu.txt in the
# folder holds the machine, the tests' last lines, the demo's scores and its cost by stage, and a model of random weights at 8B's
# shapes, streamed and resident, with the peaks of both memories: send that one file. A step that fails doesn't stop the others;
# each one's whole log stays in the folder. An hour or two, 40 GB of disk, an empty folder. The environment is that of
# `make .venv/.dev`, with a build of torch for the GPU.
set -uo pipefail
folder="$(realpath -m "${1:-gpu}")"
cd "$(dirname "$0")/.." || exit 2
export PATH="$PWD/.venv/bin:$PATH"
for command in replaceme pytest; do
  command -v "$command" > /dev/null || { echo "error: no $command here; run make .venv/.dev first" >&2; exit 2; }
done
python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())' \
  || { echo "error: torch sees no GPU; install a build of torch for it" >&2; exit 2; }
mkdir -p "$folder" || exit 2
[ -z "$(ls -A "$folder")" ] || { echo "error: $folder is not empty; name another folder" >&2; exit 2; }
out="$folder/gpu.txt"
git log -1 --format='%h %cs' > "$out" 2> /dev/null || : > "$out"
count="$(python -c 'import torch; print(torch.accelerator.device_count())')"

# step TITLE LINES COMMAND…: run it, and keep its last lines; of a failure, more of them.
step() {
  local title="$1" lines="$2" began="$SECONDS" code=0 log="$folder/${1//[^a-z0-9A-Z]/-}.log"
  shift 2
  echo "$title …" >&2
  "$@" > "$log" 2>&1 || code=$?
  [ "$code" = 0 ] || lines=80
  # Progress bars are one long line with carriage returns.
  { echo "== $title: exit code $code, $((SECONDS - began)) s"; tr '\r' '\n' < "$log" | grep -v 'it/s\]\|s/it\]' | tail -n "$lines"; } >> "$out"
}

# costs FOLDER: seconds, and the peaks of both memories so far, of each stage of a result.
costs() {
  python - "$1" <<'END'
import json, pathlib, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("stages/*.json"), key=lambda file: file.stat().st_mtime):
    cost = json.loads(file.read_text())["cost"]
    memory, device = (cost.get(key, 0) / 1e9 for key in ("peak_memory_bytes", "peak_cuda_bytes"))
    print(f"{file.stem:12} {cost['seconds']:8.1f} s  {memory:6.2f} GB  {device:6.2f} GB on the GPU")
END
}

step "this machine" 20 replaceme doctor
step "tests on the device" 25 pytest tests/device -q -p no:cacheprovider
step "demo" 25 replaceme prune --device auto --tasks '[bbc_news]' --save_path "$folder/demo"
step "demo, cost" 20 costs "$folder/demo.work"
step "demo, speed" 5 replaceme speed --device auto --save_path "$folder/demo"
step "demo, healed" 25 replaceme prune --device auto --heal_tokens 64k --tasks '[bbc_news]' --save_path "$folder/healed"
step "demo, healed, cost" 20 costs "$folder/healed.work"
if [ "$count" -gt 1 ]; then
  step "demo, two processes" 25 replaceme prune --device auto --processes 2 --tasks '[bbc_news]' --save_path "$folder/processes"
  step "demo, two processes, cost" 20 costs "$folder/processes.work"
else
  echo "== demo, two processes: left out, there is one GPU" >> "$out"
fi
step "8B, streamed" 30 python -m benchmarks.scale "$folder/8b" llama-3.1-8b 6GB auto
step "8B, as memory allows" 30 python -m benchmarks.scale "$folder/8b" llama-3.1-8b auto auto
step "all tests" 15 pytest -n 2 --dist loadfile --no-loadscope-reorder
echo "done: send $out" >&2
