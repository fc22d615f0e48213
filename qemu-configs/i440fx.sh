#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# The older chipset: one PCI bus, and interrupt lines that devices share. Slot 4 has a line of its own here.
# Steps, each in a terminal of its own:
#   sh i440fx.sh server
#   sh i440fx.sh qemu
# and in the guest what `sh i440fx.sh guest` prints.

. "$(dirname "$0")/guest.sh"
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
server)
    exec "$VFIO_USER" serve e1000 --socket-path "$SOCKET" --net echo --stats "$@"
    ;;
qemu)
    exec "$QEMU" -accel tcg -nodefaults -display none -serial mon:stdio \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -machine pc,memory-backend=memory -m 256M \
        -device '{"driver": "vfio-user-pci", "bus": "pci.0", "addr": "4",
                  "socket": {"type": "unix", "path": "'"$SOCKET"'"}}' \
        -kernel "$KERNEL" -initrd "$INITRD" -append "$APPEND" "$@"
    ;;
guest)
    echo 'ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0 && ping -c 3 10.0.2.2'
    ;;
*)
    usage
    ;;
esac
