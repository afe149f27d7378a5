"""What the data card looks for in texts: all lists of words are here.

The lists are for comparing sources, not for classifying people: a word counts whatever it means
where it stands ("he" of a quoted physician, "Chinese" of a language), and a document counts once
for a group however often it has its words. Terms are lower case, words between single spaces;
case and punctuation of a text do not count, so "African-American" is `african american`. What is
too ambiguous alone stands with the word that settles it: `white` is a blood cell first.

The card names groups of these lists and never a word of a note.
"""

# Topic -> group -> terms. A term may be in several groups.
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "sex": {
        "female": (
            *("female", "females", "woman", "women", "girl", "girls"),
            *("she", "her", "hers", "herself", "ms", "mrs"),
        ),
        "male": (
            *("male", "males", "man", "men", "boy", "boys"),
            *("he", "him", "his", "himself", "mr"),
        ),
        "transgender, intersex or non-binary": (
            *("transgender", "transsexual", "intersex", "nonbinary", "non binary"),
            *("genderqueer", "trans women", "trans men", "trans woman", "trans man"),
        ),
    },
    "age": {
        "newborn or infant": (
            *("newborn", "newborns", "neonate", "neonates", "neonatal", "infant", "infants"),
            *("infancy", "preterm"),
        ),
        "child or adolescent": (
            *("child", "children", "childhood", "pediatric", "paediatric", "boy", "boys", "girl"),
            *("girls", "toddler", "toddlers", "adolescent", "adolescents", "adolescence"),
            *("teenager", "teenagers", "youth"),
        ),
        "adult": ("adult", "adults", "adulthood", "middle aged", "middle age"),
        "older adult": (
            *("elderly", "geriatric", "older adult", "older adults", "older people"),
            *("older patients", "older persons", "octogenarian", "octogenarians"),
            *("nonagenarian", "nonagenarians", "centenarian", "centenarians"),
        ),
    },
    "race or ethnicity": {
        "as a subject": ("ethnicity", "ethnicities", "ethnic", "racial", "racism"),
        "American Indian, Alaska Native or other Indigenous": (
            *("native american", "native americans", "american indian", "american indians"),
            *("alaska native", "alaska natives", "first nations", "indigenous", "inuit"),
            *("aboriginal", "maori"),
        ),
        "Arab or Middle Eastern": ("arab", "arabs", "arabic", "middle eastern"),
        "Asian": (
            *("asian", "asians", "asian american", "asian americans", "chinese", "japanese"),
            *("korean", "koreans", "vietnamese", "filipino", "filipinos", "taiwanese", "thai"),
        ),
        "Black or African American": (
            *("african american", "african americans", "black patient", "black patients"),
            *("black man", "black men", "black woman", "black women", "black male", "black males"),
            *("black female", "black females", "black children", "blacks", "non hispanic black"),
            *("african ancestry", "african descent"),
        ),
        "Hispanic or Latino": (
            *("hispanic", "hispanics", "latino", "latinos", "latina", "latinas", "latinx"),
            *("mexican american", "mexican americans", "puerto rican", "puerto ricans"),
        ),
        "Native Hawaiian or Pacific Islander": (
            *("pacific islander", "pacific islanders", "native hawaiian", "native hawaiians"),
            *("polynesian", "polynesians", "samoan", "samoans"),
        ),
        "White": (
            *("caucasian", "caucasians", "white patient", "white patients", "white man"),
            *("white men", "white woman", "white women", "white male", "white males"),
            *("white female", "white females", "white children", "whites", "non hispanic white"),
            *("european ancestry", "european descent", "european american", "european americans"),
        ),
    },
}

# (name, words): of a line such as "Service: MEDICINE" the first entry with a word of the line.
SERVICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("neurosurgery", ("neurosurgery", "neurosurgical")),
    ("cardiothoracic surgery", ("cardiothoracic", "thoracic")),
    ("vascular surgery", ("vascular",)),
    ("plastic surgery", ("plastic", "plastics")),
    ("orthopaedics", ("orthopaedics", "orthopedics", "orthopaedic", "orthopedic", "ortho")),
    ("obstetrics and gynaecology", ("obstetrics", "gynecology", "gyn", "ob", "obgyn")),
    ("urology", ("urology",)),
    ("otolaryngology", ("otolaryngology", "ent")),
    ("dental and maxillofacial", ("dental", "maxillofacial", "omfs")),
    ("podiatry", ("podiatry",)),
    ("psychiatry", ("psychiatry",)),
    ("neurology", ("neurology",)),
    ("cardiology", ("cardiology", "cmed", "ccu")),
    ("oncology and haematology", ("oncology", "hematology", "omed", "bmt")),
    ("paediatrics and newborn", ("pediatrics", "newborn", "neonatology", "nicu")),
    ("emergency medicine", ("emergency",)),
    ("surgery", ("surgery", "surgical", "transplant", "trauma")),
    ("medicine", ("medicine", "medical", "med", "micu")),
)

# As above, of a report's line on the examination.
MODALITIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nuclear medicine and PET", ("pet", "spect", "scintigraphy", "nuclear", "hida")),
    ("mammography", ("mammogram", "mammography", "mammo", "tomosynthesis")),
    ("CT", ("ct", "cta", "ctu", "tomography")),
    ("MRI", ("mr", "mri", "mra", "mrcp", "magnetic")),
    ("ultrasound", ("us", "ultrasound", "sonogram", "doppler", "duplex")),
    ("echocardiography", ("echocardiogram", "echocardiography", "echo")),
    (
        "angiography and intervention",
        ("angiogram", "angiography", "embolization", "drainage", "biopsy", "picc", "stent"),
    ),
    ("fluoroscopy", ("fluoroscopy", "swallow", "barium", "esophagram", "fluoro")),
    (
        "radiography",
        (
            *("radiograph", "radiographs", "radiography", "xray", "x", "portable", "view", "views"),
            *("ap", "pa", "lateral", "lat", "chest", "kub", "cxr"),
        ),
    ),
)

# As above, too.
REGIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("head and neck", ("head", "brain", "skull", "sinus", "neck", "facial", "orbit", "carotid")),
    ("spine", ("spine", "cervical", "lumbar", "sacrum", "spinal")),
    ("breast", ("breast", "mammogram", "mammography", "mammo")),
    ("chest", ("chest", "thorax", "lung", "lungs", "rib", "ribs", "cxr", "thoracic", "pulmonary")),
    (
        "abdomen and pelvis",
        (
            *("abdomen", "abdominal", "abd", "pelvis", "pelvic", "liver", "gallbladder", "renal"),
            *("kidney", "bladder", "kub", "prostate", "uterus", "gi", "colon", "bowel"),
        ),
    ),
    (
        "limbs",
        (
            *("knee", "hip", "foot", "ankle", "hand", "wrist", "shoulder", "elbow", "femur"),
            *("tibia", "forearm", "humerus", "finger", "toe", "extremity", "leg", "veins"),
        ),
    ),
    ("heart", ("heart", "cardiac", "coronary", "echocardiogram")),
)

# What decides the counts.
ALL_TERMS = (TOPICS, SERVICES, MODALITIES, REGIONS)
