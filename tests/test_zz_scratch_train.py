import time, json
from train.__main__ import main
from accelerate.state import AcceleratorState
def run(cache, out, *flags):
    t=time.time()
    s=main(["--cache",str(cache),"--dataset","squares","--output_dir",str(out),"--rank","4","--lora_alpha","2", *flags])
    AcceleratorState._reset_state(True)
    print("took",time.time()-t, "status",s)
    return s
def test_x(cache,tmp_path):
    run(cache,tmp_path/"a","--max_train_steps","12","--checkpointing_steps","100")
    print((tmp_path/"a/metrics.jsonl").read_text())
    run(cache,tmp_path/"b","--max_train_steps","12","--checkpointing_steps","4","--dataloader_num_workers","2")

