#!/usr/bin/env bash
# Install what collect.sh collected, on a host that has torch and no network: see deploy/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: install.sh [options]

Run in the folder that the .tar was unpacked into. Makes a virtual environment on top of the host's own packages
(torch, transformers, triton stay the host's), installs the wheels beside it without looking at what they ask for, and
tries whether SGLang and the rollout server can be imported.

  --venv DIR     (default ./venv)
  --python PATH  the host's Python, the one that has torch (default python3)
  --skip-check   install only
  --dry-run      print the commands, run none
  --help
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$PWD/venv
python=python3
check=yes
run=()

while (($#)); do
    case $1 in
        --venv | --python)
            (($# > 1)) || { echo "install.sh: $1 takes a value; see --help" >&2; exit 2; }
            if [[ $1 == --venv ]]; then venv=$2; else python=$2; fi
            shift 2
            ;;
        --skip-check) check=no && shift ;;
        --dry-run) run=(echo +) && shift ;;
        --help | -h) usage && exit 0 ;;
        *) echo "install.sh: unknown option $1; see --help" >&2 && exit 2 ;;
    esac
done

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

[[ -f $here/SHA256SUMS ]] || fail "no SHA256SUMS in $here: unpack the .tar that collect.sh made, and run its install.sh"
(cd "$here" && sha256sum --quiet -c SHA256SUMS) || fail "files are damaged: copy the .tar again"

wanted=$(<"$here/PYTHON_VERSION")
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
[[ $found == "$wanted" ]] || fail "$python is Python $found, the wheels are for $wanted: collect.sh --python $found"
for package in torch torchvision transformers triton; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" \
        || fail "$python has no $package: install.sh builds on the host's own"
done

"${run[@]}" "$python" -m venv --system-site-packages "$venv"
"${run[@]}" "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-index --no-deps "$here"/wheels/*.whl
if ((${#run[@]})); then
    echo "+ cp -r $here/stubs $venv/stubs, and a .pth file that names it"
    exit 0
fi
rm -rf "$venv/stubs"
cp -r "$here/stubs" "$venv/stubs"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The host's own folder by name too: where its Python is a virtual environment itself, --system-site-packages skips it.
host_site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n%s\nimport headway_airgap\n' "import site; site.addsitedir('$host_site')" "$venv/stubs" \
    >"$site/headway_airgap.pth"

command -v nvcc >/dev/null || echo "note: no nvcc on PATH; SGLang compiles small kernels at first use and needs it" >&2
try_import() {
    "$venv/bin/python" -W ignore -c "import $1" || fail "cannot import $1 (see above)"
    echo "  $1"
}
if [[ $check == yes ]]; then
    echo "importing (a minute) ..."
    try_import rollout_server.engines.sglang
    try_import sglang
    "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        || fail "installed, but torch sees no GPU: the kernels were not tried"
    for module in sgl_kernel sglang.srt.managers.scheduler sglang.srt.entrypoints.http_server; do
        try_import "$module"
    done
fi
cat <<TEXT
Ready. Start the rollout server with

    $venv/bin/headway-server --model DIR --reward-funcs exact_match --engine sglang \\
        --sglang.attention-backend triton --sglang.sampling-backend pytorch --sglang.disable-cuda-graph
TEXT
