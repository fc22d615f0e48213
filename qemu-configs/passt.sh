#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# The guest on passt, without privileges: it reaches what this machine's user reaches. It is 10.0.4.15; what
# it calls 10.0.4.1 is this machine's loopback. passt of Debian 12 does not answer pings there, so arping.
# Steps, each in a terminal of its own:
#   sh passt.sh network
#   sh passt.sh server
#   sh passt.sh qemu
# and in the guest what `sh passt.sh guest` prints.

. "$(dirname "$0")/guest.sh"
: "${PASST:=/tmp/vfio-user-passt.socket}"
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
network)
    # Root has to add: --runas nobody, and to give a PASST that nobody can make.
    exec passt --foreground --ipv4-only --socket "$PASST" \
        --address 10.0.4.15 --netmask 24 --gateway 10.0.4.1 "$@"
    ;;
server)
    exec "$VFIO_USER" serve e1000 --socket-path "$SOCKET" --net "stream:$PASST" --stats "$@"
    ;;
qemu)
    exec "$QEMU" -accel tcg -nodefaults -display none -serial mon:stdio \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -machine q35,memory-backend=memory -m 256M \
        -device '{"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "'"$SOCKET"'"}}' \
        -kernel "$KERNEL" -initrd "$INITRD" -append "$APPEND" "$@"
    ;;
guest)
    echo 'ip link set eth0 up && ip address add 10.0.4.15/24 dev eth0 &&' \
        'ip route add default via 10.0.4.1 && arping -c 3 -I eth0 10.0.4.1'
    ;;
*)
    usage
    ;;
esac
