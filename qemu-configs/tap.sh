#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# The guest on a TAP device of this machine, 10.0.3.1 here and 10.0.3.2 in the guest. As root:
#   sh tap.sh network
# Then, each in a terminal of its own:
#   sh tap.sh server
#   sh tap.sh qemu
# and in the guest what `sh tap.sh guest` prints.

. "$(dirname "$0")/guest.sh"
: "${TAP:=vfu0}"
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
network)
    ip tuntap add dev "$TAP" mode tap
    ip address add 10.0.3.1/24 dev "$TAP"
    ip link set "$TAP" up
    ;;
server)
    exec "$VFIO_USER" serve e1000 --socket-path "$SOCKET" --net "tap:$TAP" --stats "$@"
    ;;
qemu)
    exec "$QEMU" -accel tcg -nodefaults -display none -serial mon:stdio \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -machine q35,memory-backend=memory -m 256M \
        -device '{"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "'"$SOCKET"'"}}' \
        -kernel "$KERNEL" -initrd "$INITRD" -append "$APPEND" "$@"
    ;;
guest)
    echo 'ip link set eth0 up && ip address add 10.0.3.2/24 dev eth0 && ping -c 3 10.0.3.1'
    ;;
*)
    usage
    ;;
esac
