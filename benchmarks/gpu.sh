#!/usr/bin/env bash
# What nobody has run yet, on a machine with a GPU: benchmarks/gpu.sh [FOLDER]. It prints nothing but where it is; gpu.txt in the
# folder holds the machine, the tests' last lines, the demo's scores and cost, and a model of random weights at 8B's shapes,
# streamed and resident: send that one file. An hour, 40 GB of disk; the environment is that of `make`, with a CUDA build of torch.
set -uo pipefail
cd "$(dirname "$0")/.."
folder="$(realpath -m "${1:-gpu}")"
mkdir -p "$folder"
out="$folder/gpu.txt"
: > "$out"

# step TITLE LINES COMMAND…: run it, and keep its last lines.
step() {
  local title="$1" lines="$2" began="$SECONDS" code=0
  shift 2
  echo "$title …" >&2
  "$@" > "$folder/log.txt" 2>&1 || code=$?
  { echo "== $title: exit code $code, $((SECONDS - began)) s"; tail -n "$lines" "$folder/log.txt"; } >> "$out"
}

step "this machine" 20 replaceme doctor
step "tests" 15 pytest -n 2 --dist loadfile --no-loadscope-reorder
step "demo" 25 replaceme prune --device auto --tasks '[bbc_news]' --save_path "$folder/demo"
step "demo, healed" 25 replaceme prune --device auto --heal_tokens 64k --tasks '[bbc_news]' --save_path "$folder/healed"
step "demo, speed" 5 replaceme speed --device auto --save_path "$folder/demo"
step "demo, two processes" 25 replaceme prune --device auto --processes 2 --tasks '[bbc_news]' --save_path "$folder/processes"
step "8B, streamed" 30 python -m benchmarks.scale "$folder/8b" llama-3.1-8b 6GB auto
step "8B, as memory allows" 30 python -m benchmarks.scale "$folder/8b" llama-3.1-8b auto auto
echo "done: send $out" >&2
