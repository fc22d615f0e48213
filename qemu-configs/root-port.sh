#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Behind a PCI Express root port of q35: a bus of its own, where it could be plugged in and out.
# Steps, each in a terminal of its own:
#   sh root-port.sh server
#   sh root-port.sh qemu
# and in the guest what `sh root-port.sh guest` prints.

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
        -machine q35,memory-backend=memory -m 256M \
        -device pcie-root-port,id=port0,chassis=1,slot=1 \
        -device '{"driver": "vfio-user-pci", "bus": "port0",
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
