#!/bin/sh
# Puts all that the image holds into a directory: the programs, the libraries that they load, the authorities of TLS, everybody's licences, and an
# SBOM (CycloneDX 1.5) of all of it. Run by the Dockerfile, in the source's directory.
#
#   collect.sh DIRECTORY FEATURES

set -eu

image=$1 features=$2
host=$(rustc -vV | sed -n 's/^host: //p')
programs='aftercommit aftercommit-relay aftercommit-worker'
docs=$image/usr/share/doc/aftercommit
registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
mkdir -p "$image/usr/bin" "$image/etc" "$docs"

# The programs. What the loader would load for them comes along, from the system on which they were built.
for program in $programs; do
    install -m 0755 "target/release/$program" "$image/usr/bin/"
    ldd "target/release/$program"
done | grep -o '/[^ ]*' | sort -u >/tmp/libraries
xargs cp --parents --dereference --target-directory "$image" </tmp/libraries
cp --parents --dereference --target-directory "$image" /etc/ssl/certs/ca-certificates.crt
printf 'aftercommit:x:65532:65532::/:/sbin/nologin\n' >"$image/etc/passwd"
printf 'aftercommit:x:65532:\n' >"$image/etc/group"
printf 'hosts: files dns\n' >"$image/etc/nsswitch.conf"

# Debian's packages: their licences, and where scanners look for what is installed.
{ xargs realpath </tmp/libraries | xargs dpkg-query --search | cut -d: -f1; echo ca-certificates; } | sort -u >/tmp/packages
mkdir -p "$image/var/lib/dpkg/status.d"
while read -r package; do
    dpkg-query --status "$package" >"$image/var/lib/dpkg/status.d/$package"
    cp --parents --dereference --target-directory "$image" "/usr/share/doc/$package/copyright"
done </tmp/packages

# The crates that the programs are made of: neither tests nor build scripts' tools.
cargo tree --locked --features "$features" --edges normal --target "$host" --prefix none --no-dedupe --format '{p}	{l}' |
    sed -nE 's/^([^ ]+) v([^ 	]+)[^	]*	(.*)$/\1	\2	\3/p' | sort -u >/tmp/crates
cp LICENSE-APACHE LICENSE-MIT "$docs/"
{
    printf 'The programs are made of these crates, too. Each is followed by the licence texts that it comes with.\n'
    while IFS='	' read -r name version licence; do
        case $name in aftercommit*) continue ;; esac
        printf '\n======== %s@%s: %s\n' "$name" "$version" "$licence"
        find "$registry"/*/"$name-$version" -maxdepth 1 -type f \
            \( -iname 'licen[cs]e*' -o -iname 'copying*' -o -iname 'notice*' -o -iname 'copyright*' \) -print0 |
            sort -z | xargs -0 -r awk 'FNR == 1 { print "" } { print }'
    done </tmp/crates
} >"$docs/LICENSES-OF-CRATES"

# The SBOM. Checksums of crates are those of Cargo.lock.
{
    awk -F'"' '/^name = / { name = $2 } /^version = / { version = $2 } /^checksum = / { print name "\t" version "\t" $2 }' Cargo.lock >/tmp/checksums
    version=$(awk -F'\t' '$1 == "aftercommit" { print $2 }' /tmp/crates)
    printf '{"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,\n "metadata": {"component": {"type": "container", "bom-ref": "image", '
    printf '"name": "aftercommit", "version": "%s", "licenses": [{"expression": "MIT OR Apache-2.0"}]}},\n "components": [\n' "$version"
    awk -F'\t' '
        NR == FNR { checksum[$1 "@" $2] = $3; next }
        {
            purl = "pkg:cargo/" $1 "@" $2
            gsub("/", " OR ", $3)
            printf "  {\"type\": \"library\", \"bom-ref\": \"%s\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"%s\"", purl, $1, $2, purl
            if ($3 != "") printf ", \"licenses\": [{\"expression\": \"%s\"}]", $3
            if ($1 "@" $2 in checksum) printf ", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"%s\"}]", checksum[$1 "@" $2]
            print "},"
        }' /tmp/checksums /tmp/crates
    # shellcheck disable=SC2016
    xargs dpkg-query --show --showformat '${Package}\t${Version}\t${Architecture}\n' </tmp/packages | awk -F'\t' '
        {
            purl = "pkg:deb/debian/" $1 "@" $2 "?arch=" $3
            printf "%s  {\"type\": \"library\", \"bom-ref\": \"%s\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"%s\"}", comma, purl, $1, $2, purl
            comma = ",\n"
        }'
    printf '\n ]\n}\n'
} >"$docs/sbom.cdx.json"
