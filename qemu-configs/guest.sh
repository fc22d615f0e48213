# SPDX-License-Identifier: BSD-3-Clause
# Read by the scenarios: which programs, which guest, which socket. Set what you want otherwise.
lab=${VFIO_USER_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/vfio-user/lab}
here=$(dirname "$0")

: "${SOCKET:=/tmp/vfio-user-e1000.socket}"
: "${VFIO_USER:=$(command -v vfio-user || echo "$here/../.venv/bin/vfio-user")}"
# The guest of `make lab`: a kernel with the e1000 driver and a shell.
: "${KERNEL:=$lab/guest/vmlinux}"
: "${INITRD:=$lab/guest/initrd.cpio}"
: "${APPEND:=console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests}"
# 10.1.1 or later; Debian 12's own is too old, `make lab` gets one where PATH has none.
if [ -z "${QEMU:-}" ]; then
    QEMU=$lab/qemu/bin/qemu-system-x86_64
    [ -x "$QEMU" ] || QEMU=qemu-system-x86_64
fi

usage() {
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
}
