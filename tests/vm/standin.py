"""A stand-in for NVIDIA's driver, for virtual machines whose GPU is a PCI device without function.

Packages with the names, versions and files of the real ones, and a kernel module small enough to
build under software emulation: it binds every GPU of the PCI bus, has the real one's names,
version, licence, /proc and /dev files, and does nothing else. DKMS, apt, modprobe and the kernel
are the real ones, which is the point.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

#: The version that the packages say they are: of a branch that CUDA 13 runs on.
VERSION = "580.95.05"
LIBRARIES = "usr/lib/x86_64-linux-gnu"

_MODULE = r"""
#include <generated/utsrelease.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/string.h>

/* What a driver that builds for a kernel and then does not work there looks like. */
static char *fails_on = "";
module_param(fails_on, charp, 0444);

static const struct pci_device_id ids[] = {
	{ PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID, PCI_ANY_ID, PCI_ANY_ID, 0x030000, 0xff0000, 0 },
	{ }
};
MODULE_DEVICE_TABLE(pci, ids);

static int probe(struct pci_dev *device, const struct pci_device_id *id) { return 0; }
static void removed(struct pci_dev *device) { }
static struct pci_driver driver = {
	.name = "nvidia", .id_table = ids, .probe = probe, .remove = removed
};

static const struct file_operations nothing = { .owner = THIS_MODULE };
static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR, .name = "nvidiactl", .fops = &nothing, .mode = 0666
};
static struct miscdevice first = {
	.minor = MISC_DYNAMIC_MINOR, .name = "nvidia0", .fops = &nothing, .mode = 0666
};

static int version(struct seq_file *file, void *unused)
{
	seq_puts(file, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  " NV_VERSION
		"  Release Build  (stand-in)\n");
	return 0;
}

static int __init start(void)
{
	int failed;

	if (*fails_on && !strncmp(UTS_RELEASE, fails_on, strlen(fails_on))) {
		pr_err("NVRM: RmInitAdapter failed! (stand-in)\n");
		return -ENODEV;
	}
	failed = pci_register_driver(&driver);
	if (failed)
		return failed;
	failed = misc_register(&control);
	if (failed)
		goto driver_out;
	failed = misc_register(&first);
	if (failed)
		goto control_out;
	proc_mkdir("driver/nvidia", NULL);
	proc_create_single("driver/nvidia/version", 0444, NULL, version);
	return 0;
control_out:
	misc_deregister(&control);
driver_out:
	pci_unregister_driver(&driver);
	return failed;
}

static void __exit stop(void)
{
	remove_proc_subtree("driver/nvidia", NULL);
	misc_deregister(&first);
	misc_deregister(&control);
	pci_unregister_driver(&driver);
}

module_init(start);
module_exit(stop);
MODULE_DESCRIPTION("Stand-in for NVIDIA's module");
MODULE_VERSION(NV_VERSION);
MODULE_LICENSE(NV_LICENSE);
"""

_UVM = r"""
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
static const struct file_operations nothing = { .owner = THIS_MODULE };
static struct miscdevice memory = {
	.minor = MISC_DYNAMIC_MINOR, .name = "nvidia-uvm", .fops = &nothing, .mode = 0666
};
static int __init start(void) { return misc_register(&memory); }
static void __exit stop(void) { misc_deregister(&memory); }
module_init(start);
module_exit(stop);
MODULE_DESCRIPTION("Stand-in for NVIDIA's unified memory module");
MODULE_VERSION(NV_VERSION);
MODULE_LICENSE(NV_LICENSE);
"""

# As Debian's packages of the driver do it: the files are called nvidia-current*.ko, the modules in
# them nvidia and nvidia_uvm, and modprobe.d leads from one name to the other.
_DKMS = """\
PACKAGE_NAME="{name}"
PACKAGE_VERSION="{version}"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_NAME[0]="{name}"
DEST_MODULE_LOCATION[0]="/updates/dkms"
BUILT_MODULE_NAME[1]="nvidia-uvm"
DEST_MODULE_NAME[1]="{name}-uvm"
DEST_MODULE_LOCATION[1]="/updates/dkms"
MAKE[0]="make -C /lib/modules/$kernelver/build M=$dkms_tree/$PACKAGE_NAME/$PACKAGE_VERSION/build"
CLEAN="true"
AUTOINSTALL="yes"
"""
_KBUILD = """\
obj-m := nvidia.o nvidia-uvm.o
ccflags-y := -DNV_VERSION='"{version}"' -DNV_LICENSE='"{license}"'
"""
_ALIASES = """\
install nvidia modprobe -i {name} $CMDLINE_OPTS
install nvidia-uvm modprobe nvidia; modprobe -i {name}-uvm $CMDLINE_OPTS
remove nvidia modprobe -r -i {name}-uvm {name}
"""
# The real packages' rules have unified memory follow the GPU's driver too.
_RULES = """\
ACTION=="add|bind", SUBSYSTEM=="pci", ATTR{vendor}=="0x10de", DRIVER=="nvidia", \
RUN+="/sbin/modprobe nvidia-uvm"
"""

_SMI = f"""\
#!/bin/sh
# Stand-in: answers as nvidia-smi does, from what the module and the library say.
loaded=$(cat /sys/module/nvidia/version 2>/dev/null)
library=$(ls /{LIBRARIES}/libnvidia-ml.so.[1-9]*.* | sed 's/.*libnvidia-ml\\.so\\.//' | head -n 1)
if [ -z "$loaded" ]; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure \
that the latest NVIDIA driver is installed and running."
  exit 9
elif [ "$loaded" != "$library" ]; then
  echo "Failed to initialize NVML: Driver/library version mismatch"
  echo "NVML library version: ${{library%.*}}"
  exit 18
fi
fields=
for option in "$@"; do
  case $option in --query-gpu=*) fields=${{option#*=}};; esac
done
index=0
for device in /sys/bus/pci/drivers/nvidia/0*; do
  [ -e "$device" ] || {{ echo "No devices were found"; exit 6; }}
  address=$(basename "$device" | tr a-f A-F)
  uuid=GPU-00000000-0000-0000-0000-00000000000$index
  if [ -z "$fields" ]; then
    echo "GPU $index: NVIDIA A100 80GB PCIe (UUID: $uuid)"
  else
    line=
    for name in $(echo "$fields" | tr , ' '); do
      case $name in
        pci.bus_id | gpu_bus_id) value=0000$address;;
        name | gpu_name) value="NVIDIA A100 80GB PCIe";;
        memory.total) value=81920;;
        driver_version) value=$loaded;;
        index) value=$index;;
        uuid | gpu_uuid) value=$uuid;;
        compute_cap) value=8.0;;
        *) value=[N/A];;
      esac
      case $name:$* in memory.total:*nounits*) ;; memory.total:*) value="$value MiB";; esac
      line="$line${{line:+, }}$value"
    done
    echo "$line"
  fi
  index=$((index + 1))
done
"""

_PERSISTENCED = """\
[Unit]
Description=NVIDIA Persistence Daemon (stand-in)

[Service]
Type=exec
# As the real one, by nvidia-modprobe: it does not wait for udev.
ExecStartPre=-/sbin/modprobe nvidia
ExecStart=/bin/sh -c 'exec 3< /dev/nvidiactl && exec sleep infinity'

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class _Package:
    name: str
    source: str
    files: dict[str, str] = field(default_factory=dict)
    executable: tuple[str, ...] = ()
    depends: str = ""
    postinst: str = ""
    prerm: str = ""


def _packages(version: str) -> list[_Package]:
    driver, own = "nvidia-graphics-drivers", f"(= {version}-1)"
    daemon = "nvidia-persistenced"
    start = f"systemctl daemon-reload\nsystemctl enable --quiet {daemon}\nsystemctl start {daemon}"
    return [
        _kernel_package("nvidia-kernel-dkms", driver, "nvidia-current", version, "NVIDIA"),
        _kernel_package(
            "nvidia-open-kernel-dkms",
            "nvidia-open-gpu-kernel-modules",
            "nvidia-current-open",
            version,
            "Dual MIT/GPL",
        ),
        _library("libnvidia-ml1", driver, "libnvidia-ml", version),
        _library("libcuda1", driver, "libcuda", version),
        _library("libnvidia-cfg1", driver, "libnvidia-cfg", version),
        _Package("nvidia-modprobe", "nvidia-modprobe"),
        _Package(
            "nvidia-smi",
            driver,
            {"usr/bin/nvidia-smi": _SMI},
            ("usr/bin/nvidia-smi",),
            f"libnvidia-ml1 {own}",
        ),
        _Package(
            daemon,
            daemon,
            {f"lib/systemd/system/{daemon}.service": _PERSISTENCED},
            postinst=f"{start} || true\n",
        ),
    ]


def _kernel_package(name: str, source: str, module: str, version: str, terms: str) -> _Package:
    tree = f"usr/src/{module}-{version}"
    return _Package(
        name,
        source,
        {
            f"{tree}/nvidia.c": _MODULE,
            f"{tree}/nvidia-uvm.c": _UVM,
            f"{tree}/Kbuild": _KBUILD.format(version=version, license=terms),
            f"{tree}/dkms.conf": _DKMS.format(name=module, version=version),
            f"etc/modprobe.d/{name}.conf": _ALIASES.format(name=module),
            f"lib/udev/rules.d/60-{name}.rules": _RULES,
        },
        depends="dkms",
        # What dh_dkms puts into the real packages.
        postinst=f"/usr/lib/dkms/common.postinst {module} {version} /usr/share/{module} '' $2\n",
        prerm=f"dkms remove -m {module} -v {version} --all || true\n",
    )


def _library(name: str, source: str, library: str, version: str) -> _Package:
    text = f"stand-in for {library}\n"
    return _Package(name, source, {f"{LIBRARIES}/{library}.so.{version}": text})


def repository(folder: Path, version: str = VERSION) -> Path:
    """Build every package into `folder`, with the list that makes it a source for apt."""
    folder.mkdir(parents=True)
    stanzas = [_build(package, version, folder) for package in _packages(version)]
    (folder / "Packages").write_text("\n".join(stanzas))
    return folder


def _build(package: _Package, version: str, folder: Path) -> str:
    """Makes its .deb; returns its stanza of the list."""
    tree = folder / f"{package.name}.tree"
    for path, text in package.files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
        (tree / path).chmod(0o755 if path in package.executable else 0o644)
    control = tree / "DEBIAN"
    control.mkdir(parents=True)
    fields = {
        "Package": package.name,
        "Source": package.source,
        "Version": f"{version}-1",
        "Architecture": "amd64",
        "Section": "non-free/kernel",
        "Maintainer": "gpufleet tests <nobody@example.org>",
        "Depends": package.depends,
        "Description": "stand-in for tests",
    }
    lines = [f"{key}: {value}\n" for key, value in fields.items() if value]
    (control / "control").write_text("".join(lines))
    scripts = {
        "postinst": f'[ "$1" = configure ] || exit 0\n{package.postinst}',
        "prerm": f'[ "$1" = remove ] || exit 0\n{package.prerm}',
    }
    for name, body in scripts.items():
        if body.count("\n") > 1:
            (control / name).write_text(f"#!/bin/sh\nset -e\n{body}")
            (control / name).chmod(0o755)
    configuration = [f"/{path}\n" for path in package.files if path.startswith("etc/")]
    if configuration:
        (control / "conffiles").write_text("".join(configuration))
    archive = folder / f"{package.name}_{version}-1_amd64.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", str(tree), str(archive)],
        capture_output=True,
        check=True,
    )
    shutil.rmtree(tree)
    data = archive.read_bytes()
    where = f"Filename: ./{archive.name}\nSize: {len(data)}\nSHA256: {sha256(data).hexdigest()}\n"
    return "".join(lines) + where
