"""What stands under each command's ``--help``: examples and exit codes."""

from __future__ import annotations

TRAIN = """\b
Examples:
  sqakd-deploy train --bits 4
  sqakd-deploy train --bits w4a8 --method ewgs --epochs 60
  sqakd-deploy train --data photos/ --model resnet18 --weights resnet18.pth --bits 4
  sqakd-deploy train --bits 2 --layer-bits 'stage1.*=4' --layer-bits conv1=4
  sqakd-deploy train --config run.yaml --lr 5e-4 --output runs/lower-rate
  sqakd-deploy train --resume runs/lower-rate
  torchrun --standalone --nproc-per-node 2 -m sqakd_deploy train --bits 4
"""
TEACHER = """\b
Examples:
  sqakd-deploy teacher --data photos/ --model resnet18 --lr 0.05 --epochs 90
  sqakd-deploy teacher --data photos/ --model resnet18 --weights DEFAULT --lr 0.005 --epochs 10
  sqakd-deploy train --data photos/ --model resnet18 --weights runs/photos-resnet18-teacher/\
teacher.safetensors
"""
EVAL = """\b
Examples:
  sqakd-deploy eval runs/digits-resnet20-w4a4-lsq
  sqakd-deploy eval model.onnx --data photos/
  sqakd-deploy eval resnet18.pth --model resnet18 --data photos/ --input-size 224 224
"""
EXPORT = """\b
Examples:
  sqakd-deploy export model.onnx
  sqakd-deploy export model.onnx --run runs/digits-resnet20-w4a4-lsq
  sqakd-deploy export model.onnx --input uint8 --batch 1
  sqakd-deploy export model.onnx --run runs/for-openvino --target onnxruntime --anyway
  sqakd-deploy export model.onnx --json > parity.json

\b
Exit codes: 0 proven, 2 wrong usage or setting, 3 the file does not give its student's answers or
breaks a documented rule of its target (nothing is written: a file of that name stays), 4 data,
5 run or weights, 6 model, 7 export, 130 interrupted.
"""
BENCH = """\b
Examples:
  sqakd-deploy bench model.onnx
  sqakd-deploy bench model.onnx --runtime onnxruntime --runtime openvino --threads 1,2
  sqakd-deploy bench model.onnx --fp32 model_fp32.onnx --json > bench.json
  sqakd-deploy bench model.onnx --plot bench.svg
  sqakd-deploy bench others.onnx --input-size 224 224

\b
Exit codes: 0 measured, 2 wrong usage or unknown runtime, 5 run, 6 a model of several inputs or
other images, 7 no such file, no ONNX file or refused by the runtime, 130 interrupted.
"""
VERIFY = """\b
Examples:
  sqakd-deploy verify model.onnx
  sqakd-deploy verify model.onnx --run runs/digits-resnet20-w4a4-lsq --layers
  sqakd-deploy verify model.onnx --layers --save-reference answers.npz
  sqakd-deploy verify model.onnx --reference answers.npz --layers --json

\b
Exit codes: 0 the file is its student, 3 it is not, 2 wrong usage or setting, 4 data or reference,
5 run or weights, 7 the file or a runtime.
"""
