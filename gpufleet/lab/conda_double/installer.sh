#!/bin/sh
# An installer in the shape of Miniconda's: the same flags, prompts and end, another content.
unset PYTHONPATH PYTHONHOME
PREFIX=$HOME/miniconda3 BATCH=0 FORCE=0 UPDATE=0
USAGE="
usage: $0 [options]

Installs Miniconda3 @VERSION@

-b           run install in batch mode (without manual intervention),
             it is expected the license terms (if any) are agreed upon
-f           no error if install prefix already exists
-h           print this help message and exit
-p PREFIX    install prefix, defaults to $PREFIX
-s           skip running pre/post-link/install scripts
-u           update an existing installation
-t           run package tests after installation (may install conda-build)
"
while getopts bfhp:sut flag; do
  case $flag in
    b) BATCH=1 ;; f) FORCE=1 ;; u) UPDATE=1 ;; p) PREFIX=$OPTARG ;; s|t) ;;
    h) printf '%s\n' "$USAGE"; exit 2 ;;
    *) printf 'ERROR: did not recognize option, please try -h\n' >&2; exit 1 ;;
  esac
done
if [ "$(wc -c < "$0")" -ne @@@SIZE@@@ ]; then
  printf 'ERROR: size of %s should be @@@SIZE@@@ bytes\n' "$0" >&2; exit 1
fi
if [ "$BATCH" = 0 ]; then
  printf '\nWelcome to Miniconda3 @VERSION@\n\nIn order to continue the installation process, please'
  printf ' review the license\nagreement.\nPlease, press ENTER to continue\n>>> '
  read -r _ || exit 1
  printf '\nDo you accept the license terms? [yes|no]\n>>> '
  read -r answer || exit 1
  [ "$answer" = yes ] || { printf 'The license agreement was not approved, aborting.\n'; exit 2; }
fi
case $PREFIX in *[[:space:]]*) printf 'ERROR: Cannot install into directories with spaces\n' >&2; exit 1 ;; esac
if [ "$FORCE$UPDATE" = 00 ] && [ -e "$PREFIX" ]; then
  printf "ERROR: File or directory already exists: '%s'\n" "$PREFIX" >&2
  printf 'If you want to update an existing installation, use the -u option.\n' >&2
  exit 1
fi
mkdir -p "$PREFIX" || { printf "ERROR: Could not create directory: '%s'\n" "$PREFIX" >&2; exit 1; }
PREFIX=$(cd "$PREFIX" && pwd)
printf 'PREFIX=%s\nUnpacking payload ...\n' "$PREFIX"
tail -c +@@@FROM@@@ "$0" | tar -xzf - -C "$PREFIX" || {
  printf 'ERROR: could not extract the payload\n' >&2; exit 1
}
printf '\nInstalling base environment...\n\n'
mkdir -p "$PREFIX/conda-meta" "$PREFIX/pkgs" "$PREFIX/envs" "$PREFIX/condabin" || exit 1
: >> "$PREFIX/conda-meta/history"
printf 'channels:\n  - defaults\n' > "$PREFIX/.condarc" || exit 1
{ printf '#!%s/bin/python\n' "$PREFIX"; cat "$PREFIX/lib/conda_double/conda.py"; } > "$PREFIX/bin/conda" ||
  exit 1
chmod 755 "$PREFIX/bin/conda"
ln -sf ../bin/conda "$PREFIX/condabin/conda"
printf 'installation finished.\n'
if [ "$BATCH" = 0 ]; then
  printf "Do you wish to update your shell profile to automatically initialize conda? [yes|no]\n>>> "
  read -r answer || exit 1
fi
exit 0
@END@
