#!/usr/bin/env bash
# Fetches the images of CC12M into data/cc12m/shards. See README.md beside this file. Run again to go on after a stop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
size="about 331 GB and several hours (img2dataset's authors: 630 samples/s, 5 h)"
test "${1-}" = --yes || { echo "this downloads $size; run it again with --yes" >&2; exit 2; }
test -f cc12m.tsv || { echo "cc12m.tsv is missing; README.md beside this script says where it is from" >&2; exit 2; }
command -v img2dataset >/dev/null || { echo "img2dataset is missing; pip install img2dataset in an environment of its own" >&2; exit 2; }
head -1 cc12m.tsv | grep -q '^url' || sed -i '1s/^/url\tcaption\n/' cc12m.tsv
NO_ALBUMENTATIONS_UPDATE=1 img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption \
  --output_format webdataset --output_folder shards --processes_count 16 --thread_count 64 \
  --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True \
  --user_agent_token img2dataset --disallowed_header_directives '["noai","noindex"]'
