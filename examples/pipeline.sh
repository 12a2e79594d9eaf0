#!/bin/sh
# From prompts to a better model, on the demo's tiny Stable Diffusion: offline, on a CPU, in some minutes.
#
#   sh examples/pipeline.sh            in a checkout, or `make pipeline`
#
#   OUTPUT     where everything goes (pipeline_output)
#   STEPS      training steps of `trl-sipo sipo`, and of the rounds together (120)
#   ROUNDS     of `trl-sipo online` (4)
#   SAMPLES    samples of each prompt (4)
#   TRL_SIPO   the command (trl-sipo)
#
# The judge "fashion" ranks all pairs. "fashion-second", another network trained on other photographs, only looks, on
# prompts that no training sees. A pipeline that was stopped goes on where it was.
set -eu

OUTPUT=${OUTPUT:-pipeline_output}
STEPS=${STEPS:-120}
ROUNDS=${ROUNDS:-4}
SAMPLES=${SAMPLES:-4}
TRL_SIPO=${TRL_SIPO:-trl-sipo}
BASE=trl_sipo/demo/assets/pipeline
export HF_HUB_OFFLINE=1

echo '== 1. feedback: samples of the base model, ranked by a judge, become preference pairs'
$TRL_SIPO feedback --model "base=$BASE" --output "$OUTPUT/feedback" --prompts fashion:train \
    --samples_per_prompt "$SAMPLES" --num_inference_steps 10 --guidance_scale 1 --sampling_batch_size 64 \
    --rewards fashion --selection all --min_margin 0.1 --device cpu

echo '== 2. sipo: training on these pairs'
$TRL_SIPO sipo --model_name_or_path "$BASE" --dataset_name "$OUTPUT/feedback/pairs.parquet" \
    --output_dir "$OUTPUT/sipo" --resume_from_checkpoint auto \
    --beta 2000 --importance_steps 10 --learning_rate 5e-5 --lr_scheduler_type constant --max_steps "$STEPS" \
    --per_device_train_batch_size 16 --precompute_latents true --gradient_checkpointing false \
    --use_cpu true --bf16 false --logging_steps 20 --save_steps 60 --save_total_limit 1 --report_to none --disable_tqdm true

echo '== 3. evaluate: base against tuned, by the judge that ranked and by one that did not'
$TRL_SIPO evaluate --models "base=$BASE" "sipo=$OUTPUT/sipo" --output "$OUTPUT/evaluation" \
    --prompts fashion:held-out --samples_per_prompt "$SAMPLES" --num_inference_steps 10 --guidance_scale 1 \
    --sampling_batch_size 64 --rewards fashion fashion-second fashion-second-correct --device cpu \
    --dataset_name "$OUTPUT/feedback/pairs.parquet" --dataset_split train --max_pairs 32

echo '== 4. online: the same in rounds, each on what the policy draws by then'
$TRL_SIPO online --config examples/configs/online_demo.yaml --output "$OUTPUT/online" \
    --rounds "$ROUNDS" --training.max_steps "$((STEPS / ROUNDS))" --training.beta 2000 \
    --sampling.samples_per_prompt "$SAMPLES" --evaluation.samples_per_prompt "$SAMPLES"

echo "== done: open $OUTPUT/evaluation/report.html and $OUTPUT/online/report.html"
