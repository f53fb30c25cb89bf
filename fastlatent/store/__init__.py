"""The latent store: format "fls/1", its files, its promises and its commit protocol. Needs no torch.

DATASET/
    dataset.json                   the commit root; what it does not name does not exist
    provenance.json                {"hashed": what decides the bytes, "informational": the rest}; written first
    shards/1x8x32x32/UNIT-XXH3.safetensors         latents, one folder per shape of row; never changed or deleted
    manifest/GGGGGG.json           the shards that generation G added
    index/GGGGGG.safetensors       one row per sample: where it lies, its label, its source
    statistics/GGGGGG.json         per latent channel, over the rows of the index
    quarantine/GGGGGG.json         files of the scan that could not become rows, and why; absent where there are none
    generation/GGGGGG.json         a copy of every dataset.json
    plan/GGGGGG.json, journal/UUID.jsonl, lease/*.json, .lock, .tmp-*    an encode in progress; a reader needs none
Files of earlier generations stay for readers that have them open; an encode never removes them.

Conventions. Numbers are little-endian. Digests are xxh3_128 (32 hexadecimal digits) unless named otherwise; in a column
one takes two uint64, the upper half first. Canonical JSON has sorted keys, no spaces, and ASCII only, lone surrogates
escaped; JSON that is hashed is hashed in that spelling. A key is a sample's relative POSIX path; its bytes are
key.encode("utf-8", "surrogateescape"), and "key order" is the order of these bytes. Paths in JSON are relative POSIX
paths that stay inside DATASET.

SHARD: a safetensors file of N >= 1 rows of one shape, which plain `safetensors.safe_open` reads. The header is padded
with spaces so that the first tensor begins at a multiple of 4096 bytes; so does every other, through U8 tensors
"_pad.0", "_pad.1" ... Tensors, in this order:
    sample_id     U64 [N]       xxh3_64 of the key's bytes
    key.offsets   U64 [N+1]     key i is key.utf8[offsets[i] : offsets[i+1]]
    key.utf8      U8            the keys' bytes
    src_xxh3      U64 [N, 2]    digest of the source file's bytes
    orig_hw       I32 [N, 2]    height and width of the source image, in pixels, upright (EXIF orientation applied);
                                0 where a converted cache did not say, in crop too
    crop          I32 [N, 4]    top, left, height, width of what the latent shows, in those pixels, rounded
    row_xxh3      U64 [N]
    NAME          further tensors, if the dataset has them, [N, ...] of any dtype; a ragged one is [total, ...], its
                  rows one after another, behind
    NAME.offsets  U64 [N+1]     row i is NAME[offsets[i] : offsets[i+1]]
    PAYLOAD.scale F32, where the payload is I8 (value = int8 * scale): [N, F]; [N, F, T], T the first size after F; of
                  ragged tokens [total]. Rounding to max|x|/127 costs 0.9 % of the std of normal numbers, 4096 of them
                  to a scale (`fastlatent.store.rows.quantize`)
    PAYLOAD       F16, F32, BF16 or I8, one of
        moments   [N, F, 2C, ...]   mean || logvar of the posterior as the autoencoder gives them: not scaled, shifted
                  or normalised, logvar not clamped. F = 2: the image, then its mirror image encoded (not the mirrored
                  latent). 1 to 3 sizes follow, (T,) H, W, say. Of a cache that was converted with its scaling unknown,
                  the provenance says so ("converted"), and values are as the cache had them
        latents   [N, F, C, ...]    the same without logvar: posterior means, or of an encoder that has no posterior;
                  0 to 3 sizes follow
        tokens    [N, F, n, D]      matrices of a teacher's tokens; ragged, [total, D], where n differs from row to row
                  F16 is the default. No row holds NaN or infinity. row_xxh3 is xxh3_64 of the payload's bytes of row i,
                  followed by those of its scale.
`__metadata__`: fls.format, fls.fingerprint, fls.provenance (canonical JSON whose SHA-256 is the fingerprint), fls.unit,
fls.bucket (the row's sizes, "FxDxHxW", D = 2C, of moments of images; -1 for the ragged one), fls.fields (JSON list of
the payload and the further tensors), fls.scaling ("raw"), fls.pixel_range (of what the autoencoder saw; "-1,1" unless
the provenance has another), fls.posterior ("mean,logvar", or "none"), fls.channels. A shard holds nothing of time,
machine or label: the same files and settings give the same bytes.
The name is the unit's id, then the digest of the file. A unit's id is the digest of canonical JSON
[fingerprint, shape of a row, [[key, digest] ...]] of all its files, those in quarantine included.

INDEX: a safetensors file with the same padding; row i is sample i, in key order; exactly the files of the last scan:
    key_hash U64 [N] (= sample_id), bucket U16 [N], shard U32 [N] (its number in the manifests taken together), row
    U32 [N], label I64 [N] (into "classes", -1 for none), src_size U64 [N], src_mtime_ns I64 [N] (of the file; where
    more than a file makes a row, a number that changes with any of it), src_xxh3 U64 [N, 2] (of the file's bytes, which
    whatever else makes the row follows), orig_hw I32 [N, 2], crop I32 [N, 4], key.offsets U64 [N+1], key.utf8 U8.
    Labels are here and nowhere else.
    With groups (trajectories, the clips of a video) the samples are ordered by group, place and key, and there are
    group U32 [N], its number, from 0 on and rising; order I64 [N], the place; group.offsets U64 [G+1], group.utf8 U8,
    the groups' keys. The rows of a group follow each other in one shard: it is one read.

DATASET.JSON: format; generation (from 1); fingerprint (SHA-256 of canonical JSON of provenance.json's "hashed");
totals {rows, shards, bytes (of shards), quarantined}; buckets [{shape (a row's sizes), dtype, rows}], which only ever
grow in number; fields [{name, required}]: the payload, required, and the further tensors, which are not, {name,
required, dtype, shape} (a first size of -1: ragged); classes [name]; manifests, indexes [{path, bytes, xxh3_128}];
statistics {path, bytes, xxh3_128}; quarantine the same, or null; previous_generation (a number, or null); xxh3_128
(digest of canonical JSON of all other members).
MANIFEST: {format, fingerprint, shards [{unit, path, bytes, header_bytes, header_xxh3_64 (of the first header_bytes),
xxh3_128, rows, bucket, first_key, last_key, statistics (of all its rows); environment, where it was made on another
machine or with other software than the first one's}]}, in the order of the plan.
STATISTICS: {count, mean, m2, posterior_variance, min, max, abs_max}, see `fastlatent.store.statistics`.
QUARANTINE: {format, fingerprint, files [{key, digest, size, mtime_ns, reason, error}]}.

COMMIT PROTOCOL. Every file is written as .tmp-NAME-UUID beside its place, fdatasynced, renamed, and the directory
fsynced (new directories too). Any number of processes, on any hosts of one file system with hard links and flock, write
one dataset together and wait for each other nowhere but at the end. Each holds .lock shared; who must have the dataset
for itself holds it exclusively.
    1. provenance.json, by link: whoever is first decides, and nobody overwrites it.
    2. plan/G.json, G the coming generation: {format, generation, fingerprint, scan, units [{unit, bucket, items [[key,
       digest, size, mtime_ns]]}]}. "scan" is the digest of all files, labels and classes (`build.scan_digest`), null
       where the plan waits for whoever comes. Units are cut from the (key, digest) pairs that no manifest, quarantine
       or journal has. Made by link, also without units; a writer with the same scan joins it. Another one replaces
       it while nobody works on it; a unit that is not done then stays if every file of the open units is unchanged.
    3. For each unit, by any writer and in any order: its shard, then one fsynced line in this writer's journal for G:
       {generation, unit, dtype, shard (as in the manifest, or null), quarantined, xxh3_128 (of canonical JSON of the
       others)}. A last line that is torn counts for
       nothing; a unit counts while its shard is there in full size. Of two lines for one unit the smaller shard
       digest wins.
    4. When all units have their line, whoever sees it first: quarantine, manifest, index, statistics of G; a file equal
       to the last generation's is named, not written again.
    5. dataset.json, by rename: this is the commit. Where it would say what it says already, there is no generation G.
    6. A copy, generation/G.json. The plan and the journals of G are removed, unfinished files by whoever is alone.
       Shards never are.
Joining or writing a plan, and 4 to 6, are done under flock of plan/.lock, each time after a look at whether
dataset.json and the plan are still those that were expected: who comes second finds G published, and returns.
LEASES save work; none of this needs them. A writer keeps lease/writer-UUID.json, {host, pid, counter, generation (of
the plan it works on, 0 for none)}, under flock, and raises its counter every 10 s. lease/UNIT.json, and lease/plan.json
of who reads the files for a plan, are hard links to it. A lease has expired when its flock is free and its host is the
observer's, else when its counter has not moved for 120 s of the observer's own clock. It is stolen by a rename to a
unique name, and a link. Whoever does work twice does it with the same bytes.
Killed anywhere, the same command run again goes on, and ends with the same bytes in every file.

STABILITY. "fls/1" is final: files written today stay readable, and nothing will need encoding again.
A reader must refuse: another "format"; an entry of "fields" that it does not know, unless its "required" is false; a
number of indexes other than one; a payload or a row shape other than these; a file whose size or digest is not the
recorded one; a shard whose size or header is not; tensors that overlap or leave holes; paths that lead outside;
numbers that point past their table.
A writer may add, and a reader must ignore: further members of any JSON object, further strings of `__metadata__`,
further tensors of shard and index, and "fields" with "required": false.
"""
