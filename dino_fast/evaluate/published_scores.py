"""What the DINO paper and its repository report, in percent, by figure and backbone.

From arXiv 2104.14294, tables 2 to 4, 6 and 8, and the README of facebookresearch/dino. All networks were trained on
ImageNet without labels. Accuracies are of ImageNet's validation images, copies those of Copydays with 10,000
distractors.
"""

PUBLISHED: dict[str, dict[str, float]] = {
    "k-NN, top-1": {
        "resnet50": 67.5, "vit_small_patch16": 74.5, "vit_small_patch8": 78.3, "vit_base_patch16": 76.1,
        "vit_base_patch8": 77.4,
    },
    "linear, top-1": {
        "resnet50": 75.3, "vit_small_patch16": 77.0, "vit_small_patch8": 79.7, "vit_base_patch16": 78.2,
        "vit_base_patch8": 80.1,
    },
    "fine-tuned, top-1": {"vit_small_patch16": 81.5, "vit_base_patch16": 82.8},
    "roxford5k medium, mAP": {"resnet50": 35.4, "vit_small_patch16": 41.8},
    "roxford5k hard, mAP": {"resnet50": 11.1, "vit_small_patch16": 13.7},
    "rparis6k medium, mAP": {"resnet50": 55.9, "vit_small_patch16": 63.1},
    "rparis6k hard, mAP": {"resnet50": 27.5, "vit_small_patch16": 34.4},
    "copies strong, mAP": {"vit_base_patch16": 81.7, "vit_base_patch8": 85.5},
}  # fmt: skip
