#!/usr/bin/env bash
# Fetches the images of LAION-400M into data/laion400m/shards. See README.md beside this file. Run again to go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
size="about 10 TB and several days (img2dataset's authors: 1300 samples/s, 3.5 days)"
test "${1-}" = --yes || { echo "this downloads $size; run it again with --yes" >&2; exit 2; }
test -d laion400m-meta || { echo "laion400m-meta is missing; README.md beside this script says what it is" >&2; exit 2; }
command -v img2dataset >/dev/null || { echo "img2dataset is missing; pip install img2dataset in an environment of its own" >&2; exit 2; }
NO_ALBUMENTATIONS_UPDATE=1 img2dataset --url_list laion400m-meta --input_format parquet --url_col URL --caption_col TEXT \
  --output_format webdataset --output_folder shards --processes_count 16 --thread_count 128 \
  --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True \
  --save_additional_columns '["NSFW","similarity","LICENSE"]'
