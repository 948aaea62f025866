# shellcheck shell=bash
# What launchers/quickstart and launchers/test share: a virtual environment with the tested versions, made once and kept.
# Source it, then call `set_up_environment demo` or `set_up_environment demo,test`.
#
# QZ3_PYTHON   the Python to use (default: python3, or the newest of python3.13 to python3.11)
# QZ3_VENV     where the virtual environment lies (default: .venv in the checkout)

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
launchers="$root/launchers"
constraints="$launchers/constraints.txt"
venv="${QZ3_VENV:-$root/.venv}"
[[ $venv == /* ]] || venv="$PWD/$venv"
python="$venv/bin/python"
log="$venv/setup.log"
marker="$venv/qz3-venv" # says that this script made the environment, and where
ticker=""
self="launchers/$(basename "$0")"

say() { printf '%s\n' "$*"; }

fail() {
  printf '\n' >&2
  printf '%s\n' "$@" >&2
  exit 1
}

format_seconds() {
  if (($1 < 60)); then printf '%d s' "$1"; else printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); fi
}

# --- One step, its noise in the log, its time on the screen --------------------------------------------------------

start_ticker() { # what
  local what=$1 begin=$SECONDS next=30 last
  (
    trap 'kill $! 2>/dev/null; exit 0' TERM
    while :; do
      sleep 1 >/dev/null &
      wait $! # a shell that waits hears the signal at once, one that runs sleep itself does a second later
      last="$(tail -n 1 "$log" 2>/dev/null | tr -d '\r' | cut -c 1-60)" || last=""
      if [[ -t 1 ]]; then
        printf '\r  %s  %s  %s\033[K' "$what" "$(format_seconds $((SECONDS - begin)))" "$last"
      elif ((SECONDS - begin >= next)); then
        next=$((next + 30))
        printf '    %s so far: %s\n' "$(format_seconds $((SECONDS - begin)))" "$last"
      fi
    done
  ) &
  ticker=$!
}

stop_ticker() {
  [[ -n $ticker ]] || return 0
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  ticker=""
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
}
trap stop_ticker EXIT

# The signal arrives while a step's output goes to the log: fd 8 is the screen.
interrupted() {
  exec >&8
  stop_ticker
  say "stopped; finished steps are kept, run the same command to go on"
  exit 130
}
exec 8>&1
trap interrupted INT TERM

try() { # what command...: returns the command's status
  local what=$1 begin=$SECONDS status=0
  shift
  step_from=$(($(wc -l <"$log") + 1))
  printf '=== %s\n+ %s\n' "$what" "$*" >>"$log"
  start_ticker "$what"
  "$@" >>"$log" 2>&1 || status=$?
  stop_ticker
  if ((status == 0)); then printf '  %-62s %s\n' "$what" "$(format_seconds $((SECONDS - begin)))"; fi
  return "$status"
}

step() { # what command...: explains a failure and ends
  try "$@" || explain_failure "$1"
}

said() { tail -n "+$step_from" "$log" | grep -qE "$1"; } # whether the last step's output has this pattern

# pip's words, and uv's.
disk_full='No space left on device|Errno 28|os error 28|[Dd]isk quota exceeded'
untrusted='CERTIFICATE_VERIFY_FAILED|invalid peer certificate|UnknownIssuer'
no_such_build='No matching distribution|ResolutionImpossible|requires a different Python|No solution found when resolving'
network_down='NewConnectionError|ConnectTimeout|Failed to resolve|Name or service not known|nodename nor servname'
network_down+='|Temporary failure in name resolution|Network is unreachable|Max retries exceeded|ReadTimeoutError'
network_down+='|Connection (refused|reset|aborted|timed out)|ProxyError|Cannot connect to proxy'
network_down+='|error sending request|dns error|tcp connect error|network timeout|operation timed out'

explain_failure() { # what
  local hint telling="" # lines to show: the last ones, or those that say why where pip's last ones mislead
  if said "$disk_full"; then
    hint="The disk is full ($(free_gib "$venv") GiB free at $venv). Free some space; QZ3_VENV=/other/disk/venv puts it elsewhere."
  elif said "$untrusted"; then
    hint="The package index's certificate is not trusted here. Behind a company proxy, set PIP_CERT to its certificate file."
  elif said "$network_down"; then
    telling="$network_down"
    hint="The package index can't be reached. Check the network, the proxy (https_proxy) or the mirror (pip config list)."
  elif said "$no_such_build"; then
    hint="A package has no build for this Python or platform ($("$python" -V 2>&1), $(uname -sm)). Try another: QZ3_PYTHON=python3.12 $self"
  elif said 'error: command .*(cc|c\+\+|clang|g\+\+).* failed|compiler'; then
    hint="A package had to be compiled and could not be. Debian, Ubuntu: apt install g++ python3-dev; Fedora: dnf install gcc-c++ python3-devel"
  else
    hint="The whole story is in $log"
  fi
  printf '\n' >&2
  tail -n "+$step_from" "$log" | grep -E "$telling" | tail -n "$([[ $telling ]] && echo 2 || echo 12)" | cut -c 1-300 | sed 's/^/  | /' >&2
  fail "This step failed: $1" "$hint" "Log: $log. Run the same command again to go on: finished steps are kept."
}

# --- The machine ------------------------------------------------------------------------------------------------------

bounded() { # seconds command...: with a time limit where the system has one
  if command -v timeout >/dev/null; then timeout "$@"; else "${@:2}"; fi
}

find_gpus() { # sets num_gpus
  local listing=""
  if command -v nvidia-smi >/dev/null; then listing="$(bounded 30 nvidia-smi -L 2>/dev/null)" || listing=""; fi
  num_gpus="$(grep -c '^GPU ' <<<"$listing" || true)"
}

runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Candidates are run, not only looked up: the shims of version managers exist for versions that are not active. The path
# printed is the interpreter itself, also from inside another virtual environment.
find_python() { # sets base_python
  local candidate found="" names="python3.13 python3.12 python3.11 python3.14 python3.15"
  if [[ -n ${QZ3_PYTHON:-} ]]; then
    runs "$QZ3_PYTHON" || fail "QZ3_PYTHON=$QZ3_PYTHON is no Python 3.11 or later that runs."
    found="$QZ3_PYTHON"
  else
    # The user's own python3 comes first, unless it is newer than what was tested.
    if python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      names="python3 $names"
    fi
    for candidate in $names python3; do
      if runs "$candidate"; then
        found="$candidate"
        break
      fi
    done
    [[ -n $found ]] || fail "Python 3.11 or later is needed, and none was found (python3: $(python3 -V 2>/dev/null || echo none))." \
      "Debian 12, Ubuntu 24.04 and later: sudo apt install python3 python3-venv python3-dev; Fedora: sudo dnf install python3.12-devel; macOS: brew install python@3.12" \
      "If it is there under another name: QZ3_PYTHON=/path/to/python3.12 $self"
  fi
  base_python="$("$found" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)')"
  "$base_python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    fail "$("$base_python" -V) ($base_python) can't make virtual environments: its venv or ensurepip module is missing." \
      "Debian, Ubuntu: sudo apt install python3-venv" "Or name another Python: QZ3_PYTHON=/path/to/python3.12 $self"
}

existing_folder() { # path, which need not exist yet
  local place="$1"
  while [[ ! -d $place ]]; do place="$(dirname "$place")"; done
  printf '%s' "$place"
}

free_gib() { # path
  df -Pk "$(existing_folder "$1")" | awk 'NR == 2 { print int($4 / 1048576) }'
}

check_disk() {
  local needed=6 free place
  place="$(existing_folder "$venv")"
  [[ -w $place ]] || fail "$place can't be written to. Put the environment elsewhere: QZ3_VENV=/other/folder/venv $self"
  if [[ $torch_build == cuda ]]; then needed=14; fi
  free="$(free_gib "$venv")"
  ((free >= needed)) || fail "Too little disk space: $needed GiB are needed for the $torch_build build and the demo, $free GiB are free at $venv." \
    "Free some space, or put the environment on another disk: QZ3_VENV=/other/disk/venv $self"
}

# On the CPU, DeepSpeed compiles one small operator when it is first used: better to hear of a missing compiler now than
# after the downloads.
check_compiler() {
  if ((num_gpus > 0)); then return 0; fi
  local compiler="${CXX:-c++}"
  command -v "${compiler%% *}" >/dev/null || fail "A C++ compiler is needed (no ${compiler%% *} here): DeepSpeed compiles a small operator for the CPU." \
    "Debian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; Arch: sudo pacman -S gcc; macOS: xcode-select --install"
  "$base_python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    fail "The headers of $("$base_python" -V) are missing (Python.h): DeepSpeed compiles a small operator for the CPU." \
      "Debian, Ubuntu: sudo apt install python3-dev; Fedora: sudo dnf install python3-devel"
}

# --- The environment --------------------------------------------------------------------------------------------------

stamp() { printf '%s' "$venv/qz3-setup.$1"; }

fingerprint() { # of all that decides what is in the environment
  { printf '%s\n' "$root" "$venv" "$torch_build" && "$python" -V && cat "$root/pyproject.toml" "$constraints" "$launchers/demo-data.txt" "$launchers/setup_env.sh"; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

is_up_to_date() { # extras
  local extra now
  now="$(fingerprint)"
  for extra in ${1//,/ }; do
    [[ -f $(stamp "$extra") && $(cat "$(stamp "$extra")") == "$now" ]] || return 1
  done
}

venv_works() {
  [[ -x $python ]] && "$python" -m pip --version >/dev/null 2>&1 || return 1
  # A virtual environment holds its own path in many places: one that was moved or copied has to be made anew.
  [[ ! -f $marker || $(cat "$marker") == "$venv" ]] || return 1
  [[ -z ${QZ3_PYTHON:-} || $("$QZ3_PYTHON" -V 2>&1) == "$("$python" -V 2>&1)" ]]
}

make_venv() {
  if [[ -e $venv && ! -f $marker && -n $(ls -A "$venv" 2>/dev/null) ]]; then
    [[ -f $venv/pyvenv.cfg ]] || fail "$venv is there and is no virtual environment. Move it away, or set QZ3_VENV to another place."
    fail "The virtual environment $venv does not work here, and the launchers did not make it. Move it away, or set QZ3_VENV to another place."
  fi
  rm -rf "$venv"
  mkdir -p "$venv" 2>/dev/null || fail "$venv can't be made. Put the environment elsewhere: QZ3_VENV=/other/folder/venv $self"
  printf '%s' "$venv" >"$marker"
  : >"$log"
  step "making a virtual environment with $("$base_python" -V)" "$base_python" -m venv "$venv"
}

pip_install() { "$python" -m pip install --no-input --disable-pip-version-check --progress-bar off -c "$constraints" "$@"; }

# uv reads none of pip's settings. Those that say where packages come from, and how to get there, are written here as uv
# takes them, a word a line: NAME=VALUE for its environment, --NAME=VALUE for its command.
pip_settings_for_uv() {
  "$python" -m pip config list | "$python" -c '
import ast, sys

variables = {
    "cert": ["SSL_CERT_FILE"], "client-cert": ["SSL_CLIENT_CERT"], "proxy": ["HTTP_PROXY", "HTTPS_PROXY"],
    "timeout": ["UV_HTTP_TIMEOUT"], "default-timeout": ["UV_HTTP_TIMEOUT"],
}
options = {
    "index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host", "constraint": "--constraints",
}
found = {}
for line in sys.stdin:
    key, _, value = line.rstrip().partition("=")
    level, _, name = key.rpartition(".")
    if level in ("global", "install", ":env:"):
        found.setdefault(name, {})[level] = ast.literal_eval(value)
for name, values in found.items():
    value = next(values[level] for level in (":env:", "install", "global") if level in values)
    for variable in variables.get(name, ()):
        print(f"{variable}={value}")
    if name in options:
        for word in value.split():
            print(f"{options[name]}={word}")
    if name == "no-index" and value.lower() in ("1", "true", "yes", "on"):
        print("--no-index")
'
}

# As pip does, uv then takes the best version of all indexes, trusts whom the system trusts, and compiles to bytecode:
# without it the first import of all takes twenty seconds more, and where Python may write none
# (PYTHONDONTWRITEBYTECODE), each one does.
uv_install() {
  local word variables=() options=(--no-progress --system-certs --index-strategy unsafe-best-match --compile-bytecode)
  while IFS= read -r word; do
    case "$word" in
      --*) options+=("$word") ;;
      ?*) variables+=("$word") ;;
    esac
  done < <(pip_settings_for_uv)
  env ${variables[@]+"${variables[@]}"} "$venv/bin/uv" pip install --python "$python" "${options[@]}" -c "$constraints" "$@"
}

# uv takes half of pip's time. Where it can't (an index that wants a password in pip's way, no room for its cache),
# pip may, and pip's words are then the ones that explain.
install() { # what argument...
  local what=$1
  shift
  if [[ -x $venv/bin/uv ]]; then
    try "$what" uv_install "$@" && return 0
    say "  uv could not do it (see $log): trying with pip"
  fi
  step "$what" pip_install "$@"
}

install_uv() {
  local what="installing uv, which installs the rest"
  try "$what" pip_install uv && return 0
  if said "$network_down|$disk_full"; then explain_failure "$what"; fi
  say "  there is no uv for this machine (see $log): pip installs the rest, which takes longer"
}

# PyTorch's own index, and which of its builds suits a driver, are known to uv; pip would take the CUDA build for every
# Linux machine. Its network limits are short, because there is a second way.
install_torch_from_its_index() { # backend
  UV_HTTP_TIMEOUT=30 UV_HTTP_CONNECT_TIMEOUT=10 UV_HTTP_RETRIES=1 \
    "$venv/bin/uv" pip install --no-progress --compile-bytecode --python "$python" -c "$constraints" --torch-backend="$1" "$torch_pin"
}

install_torch() {
  local installed
  torch_pin="$(grep '^torch==' "$constraints")"
  installed="$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" || installed=""
  # Every build runs on the CPU; only the CPU build does not run on a GPU.
  if [[ ${installed%+*} == "${torch_pin#torch==}" && ($torch_build == cpu || $installed != *+cpu) ]]; then return 0; fi
  if [[ $torch_build == cuda ]]; then
    try "installing torch, the build for this CUDA driver" install_torch_from_its_index auto && return 0
    say "  PyTorch's own index did not answer (see $log): taking pip's build, for the newest CUDA"
    install "installing torch, CUDA build" "$torch_pin"
    return 0
  fi
  # A mirror or a folder of wheels may offer the CPU build to pip itself: asking costs a second or two.
  if ! try "asking pip for its builds of torch" "$python" -m pip index versions --disable-pip-version-check torch; then
    if said "$network_down"; then explain_failure "asking pip for its builds of torch"; fi
  fi
  if said "[ ,(]${torch_pin#torch==}\+cpu([,)]|$)"; then
    install "installing torch, CPU build" "$torch_pin+cpu"
    return 0
  fi
  if [[ $(uname -s) == Darwin ]]; then
    install "installing torch, CPU build" "$torch_pin"
    return 0
  fi
  try "installing torch, CPU build" install_torch_from_its_index cpu && return 0
  say "  PyTorch's own index did not answer (see $log): taking pip's CUDA build, which is larger and runs on the CPU too"
  torch_build=cuda check_disk
  install "installing torch" "$torch_pin"
}

check_torch_sees_gpu() {
  if ((num_gpus == 0)) || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >>"$log" 2>&1; then return 0; fi
  say "  Note: torch $("$python" -c 'import torch; print(torch.__version__, "for CUDA", torch.version.cuda)') can't use the NVIDIA GPU of this machine."
  say "        Most often the driver is older than that CUDA version: update it, delete $venv and run this again."
}

set_up_environment() { # extras: "demo" or "demo,test"
  local begin=$SECONDS extras=$1 extra
  case "$(uname -s)" in
    Linux | Darwin) ;;
    *) fail "Linux or macOS is needed; on Windows, run this inside WSL." ;;
  esac
  export PIP_USER=0 DS_BUILD_OPS=0 # into the venv only; DeepSpeed's operators are compiled when they are used
  unset PYTHONHOME PYTHONPATH
  find_gpus
  torch_build=cpu
  # A GPU that is not visible now (a login node, say) is no reason to take the CUDA build away.
  if ((num_gpus > 0)) || [[ -f $venv/qz3-torch && $(cat "$venv/qz3-torch") == cuda ]]; then torch_build=cuda; fi

  # Two launchers at once would install over each other.
  exec 9<"$launchers/setup_env.sh"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "another launcher is setting up this checkout: waiting for it"
    flock 9 || true
  fi

  if venv_works && is_up_to_date "$extras"; then
    say "environment is up to date: $venv"
  else
    find_python
    check_disk
    check_compiler
    if venv_works && [[ -f $(stamp demo) ]]; then
      say "updating the environment: what it is made from has changed, or more is asked of it"
    elif ((num_gpus > 0)); then
      say "setting up: $num_gpus NVIDIA GPU(s) found, so torch's CUDA build; once, several GB, mostly download"
    else
      say "setting up: no NVIDIA GPU found, so torch's CPU build; once, about 1 GB of downloads"
    fi
    if ! venv_works; then make_venv; fi
    touch "$log"
    say "environment: $venv (details: $log)"
    install_uv
    install_torch
    install "installing qz3_widgets and what it needs" -e "${root}[$extras]"
    install "installing the demo's model" --no-deps -r "$launchers/demo-data.txt"
    check_torch_sees_gpu
    printf '%s' "$torch_build" >"$venv/qz3-torch"
    for extra in ${extras//,/ }; do fingerprint >"$(stamp "$extra")"; done
    say "environment ready after $(format_seconds $((SECONDS - begin)))"
  fi
  exec 9<&- 8>&-
  trap - INT TERM
  # As `activate` does: DeepSpeed finds ninja by its name.
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
  unset QZ3_PYTHON # it named the Python to start from; a run's launch.sh reads it as the Python to run with
}
