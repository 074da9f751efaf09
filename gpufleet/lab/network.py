"""The lab's network: a bridge with a /24 a lab, a network namespace a host, NAT to the outside or
a wall around the hosts."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab.machine import mounts_below, run, succeeds

# Private ranges in the order they are tried; the first is seldom anyone's (RFC 1918).
_RANGES = tuple(map(IPv4Network, ("10.213.0.0/16", "172.29.0.0/16", "192.168.0.0/16")))
_NETNS = Path("/run/netns")
_FIREWALL = ("ip", "filter", "FORWARD")
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
# All systemds of a lab are this machine's root, and take about 7 each; 128 are usual.
_WATCHERS = Path("/proc/sys/fs/inotify/max_user_instances")
_ENOUGH_WATCHERS = 8192
#: What walled hosts know the mirror host as: the mirror site, another site of the same content,
#: and the login page of a captive portal (.test is nobody's: RFC 6761).
MIRROR_NAMES = ("mirror.gpufleet.test", "elsewhere.gpufleet.test", "login.gpufleet.test")
#: Hosts of a lab are numbered from 1; their addresses end in 10 + number.
MOST_HOSTS = 240


@dataclass(frozen=True)
class Subnet:
    """A lab's network and the names that follow from it, none longer than IFNAMSIZ (15)."""

    network: IPv4Network

    @property
    def gateway(self) -> IPv4Address:
        """The operator's address on the bridge."""
        return self.network[1]

    @property
    def mirror(self) -> IPv4Address:
        """The address of a walled lab's mirror host, which is its host 0."""
        return self.address(0)

    @property
    def bridge(self) -> str:
        """Unique on the machine, since the network is: the base name is its middle octets."""
        octets = self.network.network_address.packed
        return f"gf{octets[1]}-{octets[2]}"

    def address(self, number: int) -> IPv4Address:
        """The address of host `number`, counted from 1."""
        return self.network[10 + number]

    def link(self, number: int) -> str:
        """The operator's end of host `number`'s cable."""
        return f"{self.bridge}-{number}"


def free_subnet(taken: Iterable[IPv4Network]) -> Subnet:
    """The first /24 that overlaps nothing of `taken`; FleetError where all do."""
    taken = [network for network in taken if network.prefixlen]
    for candidates in _RANGES:
        for network in candidates.subnets(new_prefix=24):
            if not any(network.overlaps(other) for other in taken):
                return Subnet(network)
    raise FleetError(
        "no private /24 is free for the lab: this machine's routes cover "
        f"{', '.join(map(str, _RANGES))}; take down a lab or a route (`ip route`)"
    )


def networks_in_use() -> list[IPv4Network]:
    """Every IPv4 network that this machine routes or names in /etc/resolv.conf."""
    routes = json.loads(run("ip", "-j", "-4", "route", "show", "table", "all") or "[]")
    used = []
    for route in routes:
        if route["dst"] != "default":
            used.append(IPv4Network(route["dst"], strict=False))
        if "gateway" in route:
            used.append(IPv4Network(route["gateway"]))
    return used + [IPv4Network(server) for server in name_servers() if ":" not in server]


def name_servers() -> list[str]:
    """The resolvers that a host can use: this machine's, save those on its loopback.

    FleetError where only loopback ones are known.
    """
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        named = [line.split()[1] for line in lines if line.startswith("nameserver ")]
        usable = [
            server
            for server in named
            if "%" not in server and not ipaddress.ip_address(server).is_loopback
        ]
        if usable:
            return usable
    raise FleetError(
        "/etc/resolv.conf names no server that a lab host can reach (only this machine's "
        "loopback): add a `nameserver` line with an address on the network"
    )


def _mtu() -> int:
    """The MTU towards the outside, which hosts must not exceed; 1500 where there is no route."""
    for route in json.loads(run("ip", "-j", "-4", "route", "show", "default") or "[]"):
        if mtu := link_mtu(route.get("dev", "")):
            return mtu
    return 1500


def link_mtu(link: str) -> int | None:
    """The MTU of `link`, or None where there is no such link."""
    for each in json.loads(run("ip", "-j", "link", "show") or "[]"):
        if each["ifname"] == link:
            return int(each["mtu"])
    return None


def _exists(link: str) -> bool:
    return link_mtu(link) is not None


def ensure_bridge(lab: str, subnet: Subnet, walled: Mapping[int, str] | None = None) -> None:
    """The bridge, its address and the NAT table, made or completed.

    `walled` are the hosts of a walled lab, number and name: what they send to anything but the
    mirror host, save the gateway's SSH, is counted and dropped.
    """
    try:
        if not _exists(subnet.bridge):
            run("ip", "link", "add", subnet.bridge, "mtu", str(_mtu()), "type", "bridge")
        gateway = f"{subnet.gateway}/{subnet.network.prefixlen}"
        run("ip", "address", "replace", gateway, "dev", subnet.bridge)
        run("ip", "link", "set", subnet.bridge, "up")
        run("nft", "-f", "-", given=_table(lab, subnet, bool(walled)))
        if walled:
            run("nft", "-f", "-", given=_wall(lab, subnet, walled))
        if _passes(subnet) == []:
            for direction in ("iifname", "oifname"):
                run("nft", "insert", "rule", *_FIREWALL, direction, subnet.bridge, "accept")
    except FleetError as error:
        raise FleetError(
            f"cannot make the lab's network: {error}; the kernel needs bridge, veth and nf_tables"
        ) from None


def _table(lab: str, subnet: Subnet, walled: bool) -> str:
    # Declared, deleted and declared anew in one transaction: right whatever was there.
    name = f"ip {_table_name(lab)}"
    inside = subnet.mirror if walled else subnet.network
    return f"""
        table {name}
        delete table {name}
        table {name} {{
            chain nat {{
                type nat hook postrouting priority srcnat
                ip saddr {inside} oifname != "{subnet.bridge}" masquerade
            }}
        }}
    """


def _wall(lab: str, subnet: Subnet, hosts: Mapping[int, str]) -> str:
    """The rules on the operator's ends of the hosts' cables, where every packet passes.

    Only the chains are emptied, so that the counters count on when a lab is completed.
    """
    name = f"bridge {_table_name(lab)}"
    counters = "\n".join(f"counter {host} {{ }}" for host in hosts.values())
    links = ", ".join(f'"{subnet.link(number)}" : goto walled' for number in hosts)
    counted = ", ".join(f'"{subnet.link(number)}" : "{host}"' for number, host in hosts.items())
    return f"""
        table {name} {{
            {counters}
            chain walled {{ }}
            chain cables {{ type filter hook prerouting priority filter; }}
        }}
        flush table {name}
        table {name} {{
            chain walled {{
                arp daddr ip {{ {subnet.gateway}, {subnet.mirror} }} accept
                ip daddr {subnet.mirror} accept
                ip daddr {subnet.gateway} tcp sport 22 tcp flags & (syn|ack) != syn accept
                counter name iifname map {{ {counted} }} drop
            }}
            chain cables {{
                iifname vmap {{ {links} }}
            }}
        }}
    """


def strays(lab: str, host: str) -> int:
    """How many packets `host` of a walled lab sent, or tried to send, past its wall.

    Those that were dropped on its cable, and those that its own kernel had no route for since it
    was booted (RFC 4293's ipSystemStatsOutNoRoutes).
    """
    listed = run("nft", "--json", "list", "counter", "bridge", _table_name(lab), host)
    counted = [entry["counter"]["packets"] for entry in json.loads(listed)["nftables"][1:]]
    if not namespace(host).exists():
        return sum(counted)
    tables = run(
        *("nsenter", f"--net={namespace(host)}"), "cat", "/proc/net/snmp", "/proc/net/snmp6"
    )
    names, values = (line.split() for line in tables.splitlines() if line.startswith("Ip: "))
    unroutable = dict(zip(names, values, strict=True))["OutNoRoutes"]
    six = (line.split()[1] for line in tables.splitlines() if line.startswith("Ip6OutNoRoutes"))
    return sum([*counted, int(unroutable), *map(int, six)])


def _table_name(lab: str) -> str:
    return f"gpufleet-{lab}"


def remove_bridge(lab: str, subnet: Subnet) -> None:
    """Undo `ensure_bridge`, as far as it got."""
    if _exists(subnet.bridge):
        run("ip", "link", "delete", subnet.bridge)
    for family in ("ip", "bridge"):
        if succeeds("nft", "list", "table", family, _table_name(lab)):
            run("nft", "delete", "table", family, _table_name(lab))
    for handle in _passes(subnet) or []:
        run("nft", "delete", "rule", *_FIREWALL, "handle", str(handle))


def _passes(subnet: Subnet) -> list[int] | None:
    """The rules that let the lab's packets pass this machine's firewall; None without a firewall.

    Docker and ufw drop what they do not know in this chain.
    """
    if not succeeds("nft", "list", "chain", *_FIREWALL):
        return None
    listed = json.loads(run("nft", "--json", "--handle", "list", "chain", *_FIREWALL))["nftables"]
    ours = [
        [
            {
                "match": {
                    "op": "==",
                    "left": {"meta": {"key": direction}},
                    "right": subnet.bridge,
                }
            },
            {"accept": None},
        ]
        for direction in ("iifname", "oifname")
    ]
    rules = (entry["rule"] for entry in listed if "rule" in entry)
    return [rule["handle"] for rule in rules if rule["expr"] in ours]


def namespace(host: str) -> Path:
    """The file that names the network namespace of `host`."""
    return _NETNS / f"gpufleet-{host}"


def make_host_network(host: str, subnet: Subnet, number: int, walled: bool = False) -> None:
    """A namespace of its own for `host`, with an eth0 that is on the bridge.

    A `walled` one has no route out and speaks IPv4 alone.
    """
    inside, link = namespace(host).name, subnet.link(number)
    mtu = str(link_mtu(subnet.bridge) or 1500)
    run("ip", "netns", "add", inside)
    # The same at every boot, as others remember it.
    own = hardware_address(subnet.address(number))
    veth = ("type", "veth", "peer", "name", "eth0", "address", own, "mtu", mtu, "netns", inside)
    run("ip", "link", "add", link, "mtu", mtu, *veth)
    if walled:
        # Before the link is up: else it would look for neighbours and routers by itself.
        without = 'f=/proc/sys/net/ipv6/conf/eth0/disable_ipv6; [ ! -e "$f" ] || echo 1 > "$f"'
        run("ip", "netns", "exec", inside, "sh", "-c", without)
    connect_host(subnet, number)
    run(
        *("ip", "-n", inside, "-batch", "-"),
        given=f"""
            link set lo up
            address add {subnet.address(number)}/{subnet.network.prefixlen} dev eth0
            link set eth0 up
            {"" if walled else f"route add default via {subnet.gateway}"}
        """,
    )


def make_host_tap(subnet: Subnet, number: int) -> None:
    """The cable of a virtual machine: a tap device on the bridge, which QEMU opens."""
    link = subnet.link(number)
    run("ip", "tuntap", "add", link, "mode", "tap")
    run("ip", "link", "set", link, "mtu", str(link_mtu(subnet.bridge) or 1500))
    connect_host(subnet, number)


def hardware_address(address: IPv4Address) -> str:
    """A MAC as unique as `address`, of those that anyone may give (IEEE 802, local bit set)."""
    return ":".join(f"{octet:02x}" for octet in (0x52, 0x54, *address.packed))


def connect_host(subnet: Subnet, number: int) -> None:
    """Plug the operator's end of host `number`'s cable into the bridge."""
    run("ip", "link", "set", subnet.link(number), "master", subnet.bridge, "up")


def remove_host_network(host: str, subnet: Subnet, number: int) -> None:
    """Undo `make_host_network` or `make_host_tap`, as far as it got."""
    if _exists(subnet.link(number)):
        run("ip", "link", "delete", subnet.link(number))
    if namespace(host).exists():
        run("ip", "netns", "delete", namespace(host).name)


def machine_settings() -> dict[str, object]:
    """What `change_machine` changes, as it is now; `restore_machine` takes it back to this."""
    return {
        "ip_forward": _FORWARD.read_text().strip(),
        "netns_mounted": _netns_mounted(),
        "inotify_instances": _WATCHERS.read_text().strip(),
    }


def change_machine() -> None:
    """Let this machine forward packets, which the hosts' way out needs, and let it watch as many
    files as many systemds do."""
    if _FORWARD.read_text().strip() != "1":
        _FORWARD.write_text("1\n")
    if int(_WATCHERS.read_text()) < _ENOUGH_WATCHERS:
        _WATCHERS.write_text(f"{_ENOUGH_WATCHERS}\n")


def restore_machine(before: dict[str, object]) -> None:
    """Put back what `machine_settings` saw, once no lab is left."""
    if before["ip_forward"] == "0":
        _FORWARD.write_text("0\n")
    _WATCHERS.write_text(f"{before['inotify_instances']}\n")
    # `ip netns` mounts its directory on itself when first used, and leaves it so.
    if not before["netns_mounted"] and _netns_mounted() and not any(_NETNS.iterdir()):
        run("umount", _NETNS)
        _NETNS.rmdir()


def _netns_mounted() -> bool:
    return _NETNS in mounts_below(_NETNS)  # is_mount() does not see a mount on itself
