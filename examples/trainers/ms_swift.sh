# ms-swift infers --model_type and --template of the models in its own list.
swift sft \
    --model corda-demo/base \
    --model_type llama \
    --template chatml \
    --tuner_type lora \
    --adapters my-start \
    --dataset my-chats.jsonl \
    --max_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --num_train_epochs 1 \
    --learning_rate 2e-4 \
    --output_dir my-run
