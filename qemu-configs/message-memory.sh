#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Guest memory that is QEMU's alone: no descriptor of it reaches the server, and all DMA goes by message.
# Slower; for a QEMU that may not share its memory, and to test with.
# Steps, each in a terminal of its own:
#   sh message-memory.sh server
#   sh message-memory.sh qemu
# and in the guest what `sh message-memory.sh guest` prints.

. "$(dirname "$0")/guest.sh"
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
server)
    exec "$VFIO_USER" serve e1000 --socket-path "$SOCKET" --net echo --stats "$@"
    ;;
qemu)
    exec "$QEMU" -accel tcg -nodefaults -display none -serial mon:stdio \
        -machine q35 -m 256M \
        -device '{"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "'"$SOCKET"'"}}' \
        -kernel "$KERNEL" -initrd "$INITRD" -append "$APPEND" "$@"
    ;;
guest)
    echo 'ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0 && ping -c 3 10.0.2.2'
    ;;
*)
    usage
    ;;
esac
