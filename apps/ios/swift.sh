#!/usr/bin/env bash
# Runs a command with Swift from wherever there is one: on the PATH, or in a Debian root that is built at first use.
#
#   apps/ios/swift.sh swift build
#
# It runs at the top of the repository, which is all that the root sees of this machine.
# Debian has Swift from trixie on. On an older Debian, as root, a trixie root is made from the mirror that this
# machine's apt uses (3 GB, some minutes), in HIERMEM_SWIFT_ROOT. It is a folder like any other: remove it at will.
set -euo pipefail

ROOT=${HIERMEM_SWIFT_ROOT:-/var/tmp/hiermem-swift}
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
PACKAGES=(swiftlang libc6-dev libstdc++-14-dev git)

no_swift() {
  echo "no swift on the PATH, and $1: install Swift 6 or newer (swift.org/install)" >&2
  exit 1
}

# The Debian mirror of this machine's apt sources, its security archive aside.
mirror() {
  apt-get indextargets --format '$(LABEL) $(COMPONENT) $(SITE)' 'Created-By: Packages' |
    awk '$1 == "Debian" && $2 == "main" { print $3; exit }'
}

build_root() {
  local partial=$ROOT.partial from
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap
  from=$(mirror)
  [ -n "$from" ] || no_swift "apt's sources name no Debian mirror"
  rm -rf "$partial"
  debootstrap --variant=minbase trixie "$partial" "$from"
  apt-config dump Acquire > "$partial/etc/apt/apt.conf.d/90host" # proxies and the like
  echo force-unsafe-io > "$partial/etc/dpkg/dpkg.cfg.d/unsafe-io" # nobody needs this root after a power cut
  inside "$partial" 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"' \
    "${PACKAGES[@]}"
  rm -rf "$partial"/var/cache/apt/archives/*.deb
  mv "$partial" "$ROOT"
}

# Runs a script in a root; what is mounted for it is gone when it ends.
inside() {
  local root=$1 script=$2
  shift 2
  mkdir -p "$root$REPOSITORY"
  unshare --mount --propagation private bash -c '
    set -e
    root=$0 repository=$1 script=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --bind "$repository" "$root$repository"
    exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin bash -ec "$script" inside "$@"
  ' "$root" "$REPOSITORY" "$script" "$@"
}

if command -v swift > /dev/null; then
  cd "$REPOSITORY"
  exec "$@"
fi
[ "$(id -u)" = 0 ] || no_swift "only root can make a Debian root"
command -v apt-get > /dev/null || no_swift "this is no Debian"
unshare --mount true 2> /dev/null || no_swift "nothing can be mounted here"
if [ ! -d "$ROOT" ]; then
  echo "no swift on the PATH: making a Debian root with one in $ROOT" >&2
  build_root > "$ROOT.log" 2>&1 < /dev/null || { tail -n 20 "$ROOT.log" >&2; no_swift "no root could be made, see $ROOT.log"; }
fi
# The compiler lies in folders of its own; the package's wrappers in /usr/bin are few.
inside "$ROOT" '
  cd "$1"
  shift
  bin=$(dirname "$(dpkg -L swiftlang | grep "/bin/swift-build$" | head -n 1)")
  lib=$(dirname "$(dpkg -L libswiftlang | grep "/swift/linux/libswiftCore.so$" | head -n 1)")
  PATH=$bin:$PATH LD_LIBRARY_PATH=$lib "$@"
' "$REPOSITORY" "$@"
