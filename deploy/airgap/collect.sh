#!/usr/bin/env bash
# Collect what a host without a network needs to serve with SGLang, into one .tar: see deploy/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: collect.sh [options]

Run where there is a network (no GPU is needed), from anywhere in a checkout of headway. Downloads wheels, strips
SGLang and its kernels to what one kind of GPU needs, and writes OUT.tar with install.sh in it.

  --out DIR         where to work; DIR.tar is the result (default build/airgap)
  --python X.Y      of the host that will install it (default 3.12)
  --sglang VERSION  (default 0.5.23)
  --kernel VERSION  of sglang-kernel; 0.4.5 is the last one built for torch 2.11 (default 0.4.5)
  --arch smNN       folder of kernels to keep: sm90 is H100 and H200 (default sm90)
  --dry-run         print the commands, run none
  --help
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/deploy/airgap
out=$root/build/airgap
python_version=3.12
sglang=0.5.23
kernel=0.4.5
arch=sm90
run=()

while (($#)); do
    case $1 in
        --out | --python | --sglang | --kernel | --arch)
            (($# > 1)) || { echo "collect.sh: $1 takes a value; see --help" >&2; exit 2; }
            case $1 in
                --out) out=$2 ;;
                --python) python_version=$2 ;;
                --sglang) sglang=$2 ;;
                --kernel) kernel=$2 ;;
                --arch) arch=$2 ;;
            esac
            shift 2
            ;;
        --dry-run) run=(echo +) && shift ;;
        --help | -h) usage && exit 0 ;;
        *) echo "collect.sh: unknown option $1; see --help" >&2 && exit 2 ;;
    esac
done

# What the host has already (its own torch, and whatever belongs to it), and what only tests need.
host_has='torch|torchvision|transformers|tokenizers|safetensors|huggingface-hub|numpy|pillow|regex|requests|tqdm|pyyaml'
only_tests='pytest|pytest-timeout|pluggy|iniconfig'
only_deltas='numba|llvmlite' # 64 MB; without them a server fetches every version whole

# pip compares platform names one by one: every glibc up to the host's, 2.34 here, has a name of its own.
platforms=()
for glibc in $(seq 34 -1 5); do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)

download() { # DIRECTORY PIP-ARGUMENT...
    local directory=$1
    shift
    "${run[@]}" python3 -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
        --implementation cp --python-version "$python_version" --abi "cp${python_version/./}" --abi abi3 --abi none \
        "${platforms[@]}" -d "$directory" "$@"
}

out=$(realpath -m "$out")
"${run[@]}" rm -rf "$out/wheels" "$out/stubs" # of another run with other versions
"${run[@]}" mkdir -p "$out/downloads" "$out/wheels" "$out/stubs"

echo "SGLang $sglang and the kernels of sglang-kernel $kernel (hundreds of MB) ..."
download "$out/downloads" "sglang==$sglang" "sglang-kernel==$kernel"
for wheel in "$out"/downloads/sglang-"$sglang"-*.whl; do
    "${run[@]}" python3 "$here/strip_wheel.py" "$wheel" "$out/wheels" \
        --drop 'sglang/multimodal_gen/*' --drop 'sglang/test/*' --drop 'sglang/srt/rust_extensions/*.so'
done
for wheel in "$out"/downloads/sglang_kernel-"$kernel"-*.whl; do
    "${run[@]}" python3 "$here/strip_wheel.py" "$wheel" "$out/wheels" --drop '*.so' --keep "sgl_kernel/$arch/*.so"
done

echo "the packages that both need ..."
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
grep -E '^[a-z0-9-]+==' "$root/tests/sglang_cpu/requirements.txt" \
    | grep -vE "^(sglang|apache-tvm-ffi|$host_has|$only_tests|$only_deltas)==" >"$requirements"
cat "$here/requirements.txt" >>"$requirements"
download "$out/wheels" -r "$requirements"

echo "headway itself ..."
"${run[@]}" python3 -m pip wheel -qq --disable-pip-version-check --no-deps -w "$out/wheels" "$root"

"${run[@]}" cp -r "$root/tests/sglang_cpu/stubs/xgrammar" "$here/headway_airgap.py" "$out/stubs/"
"${run[@]}" cp "$here/install.sh" "$out/"
if ((${#run[@]})); then
    echo "+ (cd $out; sha256sum ... > SHA256SUMS; tar -cf $out.tar install.sh SHA256SUMS PYTHON_VERSION wheels stubs)"
    exit 0
fi
find "$out/stubs" -name __pycache__ -prune -exec rm -r {} +
echo "$python_version" >"$out/PYTHON_VERSION"
(cd "$out" && find install.sh PYTHON_VERSION wheels stubs -type f -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
tar -C "$out" -cf "$out.tar" install.sh SHA256SUMS PYTHON_VERSION wheels stubs
echo "$out.tar: $(du -h "$out.tar" | cut -f1). On the host: tar -xf $(basename "$out").tar && ./install.sh --help"
