"""Facts about a host's kernels: one script, one round trip."""

from __future__ import annotations

from pyinfra.api import FactBase, FactProcessError, StringCommand

from gpufleet.kernel.picture import KernelPicture
from gpufleet.kernel.plan import FILES, HOLDS, PIN, parse
from gpufleet.managed.facts import STATE
from gpufleet.shell import script

# POSIX sh and what a minimal Debian or RHEL has; every line is a key, a tab and tab-separated
# values. What is dear is done only where it is needed: an initrd takes seconds to list, so it is
# listed only where it is older than the file that keeps nouveau out, or where there is none.
_SCRIPT = rf"""
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
say() {{ printf '%s' "$1"; shift; printf '\t%s' "$@"; echo; }}
[ -r /etc/os-release ] && . /etc/os-release
say os "${{ID-unknown}}" "${{ID_LIKE-}}" "${{VERSION_ID-}}"
K=$(uname -r); say running "$K"
say boot_id "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)"
say boot_free_kib "$(df -Pk /boot 2>/dev/null | awk 'NR==2 {{print $4}}')"

# The file of modprobe.d that keeps nouveau out, and when it came: dpkg keeps a package's mtime.
out=0
for f in $(grep -lsE '^[[:space:]]*(blacklist|install|alias)[[:space:]]+nouveau([[:space:]]|$)' \
    /etc/modprobe.d/*.conf /run/modprobe.d/*.conf /usr/lib/modprobe.d/*.conf \
    /lib/modprobe.d/*.conf); do
  for at in $(stat -c %Z "$f") $(stat -L -c %Z "$f"); do [ "$at" -gt "$out" ] && out=$at; done
done
[ "$out" -gt 0 ] && say nouveau_blacklisted
listed() {{
  if command -v lsinitramfs >/dev/null; then lsinitramfs "$1"
  elif command -v lsinitrd >/dev/null; then lsinitrd "$1"; fi 2>/dev/null
}}
for f in /boot/vmlinuz-*; do
  k=${{f#/boot/vmlinuz-}}
  case $k in '*'|*rescue*|*.old|*.bak|*.dpkg-*|*.fdv) continue;; esac
  m=/lib/modules/$k
  headers=no; [ -e "$m/build/include" ] && headers=yes
  i=/boot/initrd.img-$k; [ -e "$i" ] || i=/boot/initramfs-$k.img
  size=-; nouveau=no
  if [ -e "$i" ]; then
    size=$(stat -L -c %s "$i")
    if grep -qs '/nouveau\.ko' "$m/modules.dep" && [ "$size" -gt 0 ] &&
        {{ [ "$out" = 0 ] || [ "$(stat -L -c %Y "$i")" -lt "$out" ]; }} &&
        listed "$i" | grep -q '/nouveau\.ko'; then nouveau=yes; fi
  fi
  say kernel "$k" "$headers" "$size" "$nouveau"
  # Debian builds nvidia-current.ko, its open flavour nvidia-current-open.ko, older ones
  # nvidia-tesla-470.ko and the like; NVIDIA's own packages and Ubuntu's have nvidia.ko.
  n='nvidia(-current)?(-open)?(-tesla(-[0-9]+)?|-legacy-[0-9]+xx)?'
  n=$(sed -nE "s#^([^:]*/)?($n)\.ko[^:]*:.*#\2#p" "$m/modules.dep" 2>/dev/null | sort | head -n 1)
  [ -n "$n" ] && modinfo -k "$k" "$n" 2>/dev/null | awk -v k="$k" -v n="$n" '
    {{ i = index($0, ":"); f = substr($0, 1, i - 1); v = substr($0, i + 1); sub(/^ +/, "", v)
      if (!(f in a)) a[f] = v }}
    END {{ if ("version" in a) print "module\t" k "\t" n "\t" a["version"] "\t" a["vermagic"] \
      "\t" a["license"] "\t" a["signer"] }}'
  # What dkms status says, without its half second: added everywhere, built below the kernel's
  # name, installed where the link kernel-RELEASE-ARCH names it.
  for v in /var/lib/dkms/*nvidia*/*/; do
    v=${{v%/}}; [ -d "$v" ] && [ ! -h "$v" ] && [ -h "$v/source" ] || continue
    d=${{v%/*}}; s=added
    for b in "$v/$k"/*/module; do [ -d "$b" ] && s=built; done
    for l in "$d/kernel-$k"-*; do
      case $(readlink "$l") in "${{v##*/}}/$k/"*) [ $s = built ] && s=installed;; esac
    done
    say dkms "$k" "${{d##*/}}/${{v##*/}}" "$s"
    for log in "$v/build/make.log" "$v/$k"/*/log/make.log; do
      [ $s = added ] && [ -r "$log" ] && head -n 1 "$log" | grep -qF " for kernel $k (" || continue
      e=$(grep -m 1 -E 'error:|Error!|\*\*\*' "$log" | tr '\t' ' ' | cut -c 1-240)
      say dkms_error "$k" "${{e:-see $log}}"; break
    done
  done
done

for d in /boot/grub /boot/grub2; do
  [ -r "$d/grub.cfg" ] || continue
  say grub
  grep -E -e '^[[:space:]]*(menuentry|submenu|linux|set default=|\}})' -e '\{{[[:space:]]*$' \
    "$d/grub.cfg" | sed 's/^/grub_cfg\t/'
  [ -r "$d/grubenv" ] && sed -nE 's/^(saved_entry|next_entry)=/grub_env\t\1\t/p' "$d/grubenv"
  # GRUB reads LVM and RAID, btrfs and zfs, but writes to none of them.
  if [ -w "$d/grubenv" ]; then
    t=$(findmnt -n -o FSTYPE,SOURCE -T "$d" 2>/dev/null | head -n 1)
    case $t in btrfs*|zfs*|overlay*|squashfs*|iso9660*) ;;
      *) case $(lsblk -n -s -o TYPE "${{t##* }}" 2>/dev/null | tr '\n' ' ') in
           *lvm*|*raid*|*linear*|'') ;; *) say grub_writable;; esac;;
    esac
  fi
  # Shell files, which update-grub sources as this does.
  say grub_default "$( {{ [ -r /etc/default/grub ] && . /etc/default/grub
    for f in /etc/default/grub.d/*.cfg; do [ -r "$f" ] && . "$f"; done; }} >/dev/null 2>&1
    printf %s "$GRUB_DEFAULT")"
  for f in /etc/default/grub.d/*.cfg; do
    grep -qsE '^[[:space:]]*(export[[:space:]]+)?GRUB_DEFAULT=' "$f" && say grub_dropin "$f"
  done
  break
done
command -v grubby >/dev/null && say grubby "$(grubby --default-kernel 2>/dev/null)"

v=/sys/firmware/efi/efivars
on=$(od -An -t u1 -j 4 -N 1 $v/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c 2>/dev/null)
shim=$(od -An -t u1 -j 4 -N 1 $v/MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23 2>/dev/null)
[ "${{on:-0}}" -eq 1 ] && [ "${{shim:-0}}" -ne 1 ] && say secure_boot
sed -nE 's/^.* asymmetri +(.*): [0-9a-f]+: X509.*/trusted\t\1/p' /proc/keys 2>/dev/null

if command -v dpkg-query >/dev/null; then
  a=$(dpkg --print-architecture)
  f='${{binary:Package}}\t${{Version}}\t${{source:Package}}\t'
  f="$f"'${{db:Status-Want}}\t${{db:Status-Status}}\n'
  dpkg-query -W -f "$f" '*' 2>/dev/null | awk -F '\t' -v OFS='\t' -v a=":$a" '
    {{ n = length($1) - length(a); if (substr($1, n + 1) == a) $1 = substr($1, 1, n) }}
    $4 == "hold" {{ print "hold", $1 }}
    $5 == "not-installed" || $5 == "config-files" {{ next }}
    $1 ~ /^linux-|nvidia|^cuda-drivers|^dkms$|^unattended-upgrades$/ ||
      $3 ~ /^linux|nvidia|fabric-?manager/ {{ print "package", $0 }}'
  dpkg --audit 2>/dev/null | sed -nE 's/^ ([a-z0-9][^ ]*).*/audit\t\1/p'
  # Without lists: whether what is installed fits together is asked, and that is ten times quicker.
  e=$(apt-get check -qq -o Debug::NoLocking=1 -o Dir::Etc::SourceList=/dev/null \
    -o Dir::Etc::SourceParts=/dev/null -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= 2>&1) ||
    say broken "$(printf '%s\n' "$e" | grep -m 1 -E '^ .*:|^E: ' | tr -s '\t ' ' ')"
  for f in /etc/apt/preferences /etc/apt/preferences.d/*; do
    case ${{f##*/}} in *[!A-Za-z0-9_.-]*) continue;; *.pref|preferences) ;; *.*) continue;; esac
    grep -qsiE '^Package:.*(linux|nvidia|cuda|[*?/])' "$f" || continue
    sed "s|^|preference\t$f\t|" "$f"; echo
  done
  o='Package-Blacklist|Remove-Unused-Kernel-Packages|Automatic-Reboot'
  apt-config dump 2>/dev/null | sed -nE \
    "s/^((Unattended-Upgrade::($o)|APT::Periodic::[^ :]+)(::)?) \"(.*)\";\$/unattended\t\1\t\5/p"
  for l in /var/lib/dpkg/lock-frontend /var/lib/dpkg/lock; do
    [ -e "$l" ] || continue
    for p in $(awk -v i=":$(stat -c %i "$l")" '
        substr($6, length($6) - length(i) + 1) == i && $5 > 0 {{ print $5 }}' /proc/locks); do
      for d in /proc/"$p"/fd/*; do
        [ "$(readlink "$d" 2>/dev/null)" = "$l" ] || continue
        say apt_lock "$(cat "/proc/$p/comm") (pid $p)"; break 3
      done
    done
  done
elif command -v rpm >/dev/null; then
  f='package\t%{{NAME}}\t%{{VERSION}}-%{{RELEASE}}\t%{{SOURCERPM}}\tinstall\tinstalled\n'
  rpm -qa --qf "$f" 'kernel*' '*nvidia*' 'cuda-drivers*' 'dkms*' 2>/dev/null
  # What dnf versionlock list prints, without starting dnf; dnf 5 has a TOML file.
  sed -nE 's/^([^#! ][^ ]*).*/hold\t\1/p' /etc/dnf/plugins/versionlock.list \
    /etc/yum/pluginconf.d/versionlock.list 2>/dev/null
  sed -nE 's/^name = "(.*)"$/hold\t\1/p' /etc/dnf/versionlock.toml 2>/dev/null
  sed -nE 's/^(exclude|excludepkgs|installonly_limit)[ =]+(.*)$/dnf\t\1\t\2/p' \
    /etc/dnf/dnf.conf /etc/yum.conf 2>/dev/null
fi
[ -e /usr/bin/nvidia-uninstall ] && say runfile
[ -r {PIN} ] && sed -n '1s/^/pinned\t/p' {PIN}
[ -r {HOLDS} ] && sed 's/^/own_hold\t/' {HOLDS}
for p in {" ".join(FILES)}; do
  if [ -f "$p" ]; then
    say file "$p" "$(stat -c %a "$p")" "$(stat -c %U "$p")" "$(stat -c %G "$p")" \
      "$(sha256sum < "$p" | cut -d ' ' -f 1)"
  fi
  [ -f {STATE}/written"$p" ] && say record "$p" "$(cat {STATE}/written"$p")"
done
:
"""


class KernelFacts(FactBase[KernelPicture]):
    """Everything about a host's kernels, their modules and what pins them: `KernelPicture`."""

    def command(self) -> StringCommand:
        return script(_SCRIPT)

    @staticmethod
    def default() -> KernelPicture:
        return parse([])

    def process(self, output: list[str]) -> KernelPicture:
        try:
            return parse(output)
        except ValueError as error:
            raise FactProcessError(f"unexpected output of the kernel script: {error}") from error
