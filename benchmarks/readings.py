"""Open readings of three papers, as arms and comparisons of replicate.py: where a text leaves a choice, or a
small run disagrees with it, what do runs say?

    python benchmarks/replicate.py --data cifar10.npz --scale small --jobs 2 --table docs/READINGS.md \\
        --only ddae_readings,ve_readings,cim_readings
    python benchmarks/replicate.py --data tiny.npz --scale tiny_imagenet --jobs 12 --only twelve,twelve_more
"""

CONTINUED = {"--generator_init": "raw/last.pth", "--discriminator_init": "raw/encoder.pth"}
TOKENS = {"--tokenizer": "tokenizer/tokenizer.pth"}
LONGER = {"--generator_init": "raw_on/last.pth", "--discriminator_init": "raw_on/encoder.pth"}
FROM_MAE = {"--init": "mae/encoder.pth"}
FEW = "{cim} --no-share --data {few} --epochs 60 --warmup_epochs 6"
TWELVE, PASSES = "{cim} --model tiny --generator_depth 4", "--batch_size 32 --epochs 1.5 --warmup_epochs 0.15"
UNSEEN = "{cim} --no-share --data {unseen} --epochs 1 --warmup_epochs 0 --lr 1e-12 --min_lr 0"
# name: (flags, what it starts from). {x}: the flags of replicate.py's arms; {slow30}: MAE's rate over 30;
# {half}: passes of half the run; {few}, {unseen}: 2,000 of the images, 2,000 others
ARMS = {
    "ddae_beta-1": ("ddae.py {ddae} --no-learn_beta --beta_init -1", {}),
    "ddae_beta-.5": ("ddae.py {ddae} --no-learn_beta --beta_init -0.5", {}),
    "ddae_beta.5": ("ddae.py {ddae} --no-learn_beta --beta_init 0.5", {}),
    "ddae_2levels": ("ddae.py {ddae} --num_levels 2", {}),
    "ddae_instance": ("ddae.py {ddae} --feature_norm instance", {}),
    "ddae_channel": ("ddae.py {ddae} --feature_norm channel", {}),
    "ddae_on": ("ddae.py {ddae}", FROM_MAE),
    "mae_on": ("mae_mff.py {mae}", FROM_MAE),
    "ddae_ramp": ("ddae.py {ddae} --feature_ramp 0.25", {}),
    "ddae_random": ("ddae.py {ddae} --mask random", {}),
    "ddae_literal": ("ddae.py {ddae} --reg literal", {}),
    "ddae_none": ("ddae.py {ddae} --reg none", {}),
    "ds_random": ("ddae.py {ddae} --no-distill --decoder mae --no-dynamic --mask random", {}),
    "dds_random": ("ddae.py {dds} --mask random", {}),
    "ve_image": ("vision_electra.py {ve} --adversarial_levels image", CONTINUED),
    "ve_ratio.1": ("vision_electra.py {ve} --gan_ratio 0.1", CONTINUED),
    "ve_ratio.3": ("vision_electra.py {ve} --gan_ratio 0.3", CONTINUED),
    "ve_slow": ("vision_electra.py {ve} --generator_lr_scale 0.1", CONTINUED),
    "ve_alone": ("vision_electra.py {ve} --gan_weight 0", CONTINUED),
    "ve_blur": ("vision_electra.py {ve} --gan_weight 0 --blur 1", CONTINUED),
    "ve_waits": ("vision_electra.py {ve} --gan_ratio 0.1 --generator_waits --generator_warmup_epochs {half}",
                 CONTINUED),
    "ve_30": ("vision_electra.py --base_lr {slow30} --gan_ratio 0.1", CONTINUED),
    "ve_100": ("vision_electra.py --base_lr {slow100} --gan_ratio 0.1", CONTINUED),
    "ve_r1": ("benchmarks/ve_r1.py {ve} --gan_ratio 0.1", CONTINUED),
    "ve_long": ("vision_electra.py {ve} --gan_ratio 0.1", LONGER),
    "raw_long": ("mae_mff.py {raw}", {"--init": "raw_on/last.pth"}),
    "respix_alone": ("cim.py {cim} --no-share", TOKENS),
    "respix_alone_argmax": ("cim.py {cim} --no-share --sampling argmax", TOKENS),
    "respix_alone_uniform": ("cim.py {cim} --no-share --sampling uniform", TOKENS),
    "respix_12": (f"cim.py {TWELVE}", TOKENS),
    "respix_12_argmax": (f"cim.py {TWELVE} --sampling argmax", TOKENS),
    "respix_12_longer": (f"cim.py {TWELVE} {PASSES}", TOKENS),
    "respix_12_longer_argmax": (f"cim.py {TWELVE} {PASSES} --sampling argmax", TOKENS),
    "respix_half_window": ("cim.py {cim} --window {window}", TOKENS),
    "respix_channels": ("cim.py {cim} --window_per_channel", TOKENS),
    "respix_few": (f"cim.py {FEW}", TOKENS),
    "respix_few_argmax": (f"cim.py {FEW} --sampling argmax", TOKENS),
    "respix_few_unseen": (f"benchmarks/cim_unseen.py {UNSEEN}", TOKENS | {"--init": "respix_few/last.pth"}),
    "respix_few_argmax_unseen": (f"benchmarks/cim_unseen.py {UNSEEN} --sampling argmax",
                                 TOKENS | {"--init": "respix_few_argmax/last.pth"}),
    "revdet_uniform": ("cim.py {cim} --objective revdet --sampling uniform", TOKENS),
}
# What the last lines of a training log say of how much was learned
WATCHED = ("mse", "beta/4", "target/constant", "reconstruction_loss", "image_accuracy_real",
           "image_accuracy_fake", "patch_accuracy_fake", "gan_weight", "generator_accuracy", "enhancer_loss",
           "revdet_auc", "revdet_gain")
PROBES, BOTH = ("linear", "linear_mean"), ("finetune", "linear")
ALL = ("finetune", "share_1", *PROBES)
CLAIMS = [  # group, words, where it is asked, first, second, read-outs
    *(("ddae_readings", words, source, f"ddae_{name}", "ddae", PROBES) for name, words, source in (
        ("beta-1", "beta fixed at -1 beats a learned one", "DDAE, table 7"),
        ("beta-.5", "beta fixed at -0.5 beats a learned one", "DDAE, table 7"),
        ("beta.5", "beta fixed at 0.5 beats a learned one", "DDAE, table 7"),
        ("literal", "eq. 6's regulariser as printed beats the scaled one", "DDAE, eq. 6"),
        ("none", "no regulariser beats the scaled one", "DDAE, eq. 6"),
        ("2levels", "two levels beat four, of four blocks", "the paper: every third of twelve"),
        ("instance", "the target without its image's mean is better", "ours"),
        ("channel", "the target standardised by channel is better", "data2vec's"),
        ("ramp", "a ramp of the feature loss is better", "BootMAE's code"))),
    ("ddae_readings", "from a trained encoder DDAE beats MAE going on", "ours", "ddae_on", "mae_on", PROBES),
    ("ddae_readings", "DDAE with random masks beats MAE", "DDAE, abstract", "ddae_random", "mae", PROBES),
    ("ddae_readings", "deep supervision with random masks beats MAE", "DDAE, table 3", "ds_random", "mae",
     PROBES),
    ("ddae_readings", "DDS with random masks beats MAE", "DDAE, table 2", "dds_random", "mae", PROBES),
    *(("ve_readings", f"{words}: beats MAE going on", "VE, abstract", f"ve_{name}", "raw_on", PROBES)
      for name, words in (
          ("image", "the image level alone deceives"),
          ("ratio.1", "gradient ratio .1"),
          ("ratio.3", "gradient ratio .3"),
          ("slow", "a tenth of the rate for the generator"),
          ("alone", "no deceiving"),
          ("blur", "no deceiving, both blurred"),
          ("waits", "ratio .1, the generator waits"),
          ("30", "ratio .1, MAE's rate / 30"),
          ("100", "ratio .1, MAE's rate / 100"),
          ("r1", "ratio .1, R1 penalty"))),
    ("ve_readings", "ratio .1, from twice the updates of MAE: beats it going on", "VE, abstract", "ve_long",
     "raw_long", PROBES),
    *(("ve_readings", f"{words}, layer decay 0.9: beats MAE going on", "VE, abstract", name, "raw_on",
       ("finetune_.9",))
      for name, words in (("ve", "a weight of 0.2"), ("ve_ratio.1", "gradient ratio .1"),
                          ("ve_alone", "no deceiving"))),
    ("cim_readings", "nothing shared, sampling beats argmax", "CIM, table 7", "respix_alone",
     "respix_alone_argmax", BOTH),
    ("cim_readings", "nothing shared, sampling beats uniform tokens", "CIM, table 7", "respix_alone",
     "respix_alone_uniform", BOTH),
    ("cim_readings", "2,000 images, 60 passes, nothing shared: sampling beats argmax", "CIM, table 7",
     "respix_few", "respix_few_argmax", BOTH),
    ("cim_readings", "their losses on images they have not seen", "CIM, table 7",
     "respix_few_unseen", "respix_few_argmax_unseen", ()),
    ("cim_readings", "twelve blocks, four of them the generator's: sampling beats argmax", "CIM, table 7",
     "respix_12", "respix_12_argmax", BOTH),
    ("cim_readings", "the same after 1.5 passes, 2,343 updates of 32", "CIM, table 7", "respix_12_longer",
     "respix_12_longer_argmax", BOTH),
    ("cim_readings", "sharing helps", "CIM, table 5", "respix", "respix_alone", BOTH),
    ("cim_readings", "a window of half a patch beats one of 8 px", "the paper: 8 of 16 px",
     "respix_half_window", "respix", BOTH),
    ("cim_readings", "windows per channel beat joint ones", "open", "respix_channels", "respix", BOTH),
    ("cim_readings", "RevDet of uniform tokens beats that of sampled ones", "a check", "revdet_uniform",
     "revdet", BOTH),
    *(("twelve", *claim, ALL) for claim in (
        ("MFF beats MAE", "MFF's main claim", "mff", "mae"),
        ("PixMIM's target and crop beat MAE's", "PixMIM's main claim", "pixmim", "mae"),
        ("DDAE with random masks beats MAE", "DDAE, abstract", "ddae_random", "mae"),
        ("DDAE with its own masks beats MAE", "DDAE, abstract", "ddae", "mae"),
        ("DDS with random masks beats MAE", "DDAE, table 2", "dds_random", "mae"),
        ("self-distillation helps, with random masks", "DDAE, table 4", "ddae_random", "dds_random"),
        ("random masks beat DDAE's own", "ours", "ddae_random", "ddae"),
        ("VE, gradient ratio .1: beats MAE going on", "VE, abstract", "ve_ratio.1", "raw_on"))),
    ("twelve", "MAE beats random weights", "", "mae", "scratch", ("finetune",)),
    *(("twelve_more", *claim, ALL) for claim in (
        ("VE, a weight of 0.2: beats MAE going on", "VE, abstract", "ve", "raw_on"),
        ("RevDet beats ResPix", "CIM, table 1: equal", "revdet", "respix"),
        ("sampling beats argmax", "CIM, table 7", "respix", "respix_argmax"),
        ("VE, ratio .1, from twice the updates of MAE: beats it going on", "ours", "ve_long", "raw_long"),
        ("VE, ratio .1, R1 penalty: beats ratio .1 alone", "ours", "ve_r1", "ve_ratio.1"),
        ("deep supervision with random masks beats MAE", "DDAE, table 3", "ds_random", "mae"),
        ("the target without its image's mean is better", "ours", "ddae_instance", "ddae"))),
    *(("twelve_more", f"{words} beats random weights", "CIM, table 1: +1.0", first, "scratch", ("finetune",))
      for words, first in (("ResPix", "respix"), ("RevDet", "revdet"))),
]
