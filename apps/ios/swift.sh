#!/usr/bin/env bash
# Runs a command with Swift from where there is one: on the PATH, or in a Debian root (HIERMEM_SWIFT_ROOT).
#
#   apps/ios/swift.sh swift build
#
# It runs at the top of the repository, which is all that the root sees of this machine. It installs nothing.
set -euo pipefail

ROOT=${HIERMEM_SWIFT_ROOT:-/var/tmp/hiermem-swift}
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)

no_swift() {
  echo "no swift on the PATH, and $1: install Swift 6 or newer (swift.org/install)," >&2
  echo "or on Debian, as root, run .ci/swift-root, which makes a root with Swift (3 GB)" >&2
  exit 1
}

# Runs a script in the root; what is mounted for it is gone when it ends.
inside() {
  local script=$1
  shift
  mkdir -p "$ROOT$REPOSITORY"
  unshare --mount --propagation private bash -c '
    set -e
    root=$0 repository=$1 script=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --bind "$repository" "$root$repository"
    exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin bash -ec "$script" inside "$@"
  ' "$ROOT" "$REPOSITORY" "$script" "$@"
}

if command -v swift > /dev/null; then
  cd "$REPOSITORY"
  exec "$@"
fi
[ -d "$ROOT" ] || no_swift "no root in $ROOT"
[ "$(id -u)" = 0 ] || no_swift "only root can use the one in $ROOT"
unshare --mount true 2> /dev/null || no_swift "nothing can be mounted here, so that the root in $ROOT is of no use"
# The compiler lies in folders of its own; the package's wrappers in /usr/bin are few.
inside '
  cd "$1"
  shift
  bin=$(dirname "$(dpkg -L swiftlang | grep "/bin/swift-build$" | head -n 1)")
  lib=$(dirname "$(dpkg -L libswiftlang | grep "/swift/linux/libswiftCore.so$" | head -n 1)")
  PATH=$bin:$PATH LD_LIBRARY_PATH=$lib "$@"
' "$REPOSITORY" "$@"
