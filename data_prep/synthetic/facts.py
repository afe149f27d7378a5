"""What the made-up corpus is about: conditions with what goes with each of them.

The relations (condition to symptom, drug, laboratory value, finding, code) are what a model can
learn from the corpus. They are plausible, simplified and written for the demo: no medical advice,
and the codes of the demo are not those of any official classification beyond their first letters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One condition.

    icd10, icd9: three-character categories.
    drugs: (name, doses in order, unit, frequency).
    lab: (long name, short name, lowest, highest value in this condition, decimals, unit).
    study, finding, impression: of its imaging. marker: a gene or protein that abstracts speak of.
    """

    name: str
    icd10: str
    icd9: str
    service: str
    symptoms: tuple[str, ...]
    drugs: tuple[tuple[str, tuple[str, ...], str, str], ...]
    lab: tuple[str, str, float, float, int, str]
    exam: str
    study: str
    finding: str
    impression: str
    procedure: str
    marker: str


# One condition a block, its fields in the order of the class: `|` parts fields, `;` their items.
# Lines are broken after either.
_FIELDS = """
type 2 diabetes mellitus|E11|250|MEDICINE|polyuria;polydipsia;blurred vision;fatigue|
metformin 500/850/1000 mg BID;glipizide 5/10 mg DAILY;insulin glargine 10/18/24 units QHS|
hemoglobin A1c;HbA1c;7.4;12.9;1;%|decreased monofilament sensation in both feet|
renal ultrasound|the kidneys are normal in size with mildly increased cortical echogenicity|
no hydronephrosis|diabetic foot debridement|TCF7L2

heart failure|I50|428|CARDIOLOGY|orthopnea;leg swelling;dyspnea on exertion;weight gain|
furosemide 20/40/80 mg DAILY;metoprolol succinate 25/50/100 mg DAILY;
spironolactone 12.5/25 mg DAILY|
NT-proBNP;proBNP;1450;18900;0;pg/mL|elevated jugular venous pressure and bilateral pitting edema|
chest radiograph|
there is cardiomegaly with cephalization of the pulmonary vessels and small bilateral effusions|
pulmonary edema|right heart catheterization|NPPB

atrial fibrillation|I48|427|CARDIOLOGY|palpitations;lightheadedness;irregular heartbeat|
apixaban 2.5/5 mg BID;diltiazem 120/180/240 mg DAILY;amiodarone 200/400 mg DAILY|
thyrotropin;TSH;0.4;4.8;2;mIU/L|irregularly irregular rhythm without murmur|
transthoracic echocardiogram|
the left atrium is moderately dilated with preserved ventricular function|
dilated left atrium|electrical cardioversion|PITX2

community-acquired pneumonia|J18|486|MEDICINE|productive cough;fever;pleuritic chest pain;chills|
ceftriaxone 1/2 g Q24H;azithromycin 250/500 mg DAILY;levofloxacin 500/750 mg DAILY|
procalcitonin;PCT;0.6;18.4;1;ng/mL|crackles and dullness at the right base|
chest radiograph|there is a focal consolidation in the right lower lobe with air bronchograms|
right lower lobe pneumonia|diagnostic thoracentesis|IL6

chronic obstructive pulmonary disease|J44|496|MEDICINE|wheezing;chronic cough;dyspnea on exertion|
tiotropium 18 mcg DAILY;prednisone 20/40 mg DAILY;albuterol 90 mcg Q6H:PRN|
arterial carbon dioxide tension;pCO2;46;78;0;mmHg|
diffuse expiratory wheezes with a prolonged expiratory phase|
chest radiograph|the lungs are hyperinflated with flattened diaphragms|
emphysema without acute consolidation|bronchoscopy|SERPINA1

asthma|J45|493|MEDICINE|wheezing;chest tightness;nocturnal cough|
budesonide 180/360 mcg BID;montelukast 10 mg QHS;albuterol 90 mcg Q4H:PRN|
blood eosinophil count;Eos;4.2;14.8;1;%|bilateral expiratory wheezes|
chest radiograph|the lungs are clear with mild peribronchial cuffing|
no focal consolidation|spirometry|IL13

pulmonary embolism|I26|415|MEDICINE|sudden dyspnea;pleuritic chest pain;hemoptysis|
enoxaparin 60/80/100 mg Q12H;rivaroxaban 15/20 mg DAILY;heparin 5000 units BID|
D-dimer;D-Dimer;890;9400;0;ng/mL|tachycardia with clear lungs|CT angiogram of the chest|
there is a filling defect in the right main pulmonary artery extending into the lobar branches|
acute pulmonary embolism|inferior vena cava filter placement|F5

chronic kidney disease|N18|585|NEPHROLOGY|fatigue;pruritus;nocturia;poor appetite|
sevelamer 800/1600 mg TID;calcitriol 0.25/0.5 mcg DAILY;epoetin alfa 4000/10000 units weekly|
serum creatinine;Creat;2.1;7.8;1;mg/dL|trace ankle edema and conjunctival pallor|
renal ultrasound|both kidneys are small and echogenic with cortical thinning|
medical renal disease|arteriovenous fistula creation|APOL1

acute kidney injury|N17|584|NEPHROLOGY|decreased urine output;nausea;confusion|
lactated Ringer's 1/2 L IV;sodium bicarbonate 650/1300 mg TID|
blood urea nitrogen;UreaN;44;128;0;mg/dL|dry mucous membranes|
renal ultrasound|the kidneys are normal in size without hydronephrosis|
no obstruction|temporary dialysis catheter placement|HAVCR1

hypothyroidism|E03|244|ENDOCRINOLOGY|cold intolerance;constipation;weight gain;dry skin|
levothyroxine 50/88/112 mcg DAILY;liothyronine 5/25 mcg DAILY|
thyrotropin;TSH;8.9;64.2;1;mIU/L|delayed relaxation of the ankle reflexes|
thyroid ultrasound|the thyroid is heterogeneous and mildly enlarged|
chronic thyroiditis|fine-needle aspiration of the thyroid|TPO

hyperthyroidism|E05|242|ENDOCRINOLOGY|heat intolerance;weight loss;tremor;palpitations|
methimazole 5/10/20 mg DAILY;propranolol 10/20/40 mg TID|
free thyroxine;FreeT4;2.4;7.7;1;ng/dL|fine tremor of the outstretched hands and lid lag|
thyroid uptake scan|there is diffusely increased uptake in both lobes|
Graves disease|radioiodine ablation|TSHR

cirrhosis|K74|571|HEPATOLOGY|abdominal distension;jaundice;easy bruising|
lactulose 15/30 mL TID;rifaximin 550 mg BID;nadolol 20/40 mg DAILY|
total bilirubin;TotBili;2.4;19.8;1;mg/dL|shifting dullness, spider angiomata and asterixis|
abdominal ultrasound|the liver is nodular with moderate ascites and splenomegaly|
cirrhosis with portal hypertension|large-volume paracentesis|PNPLA3

acute pancreatitis|K85|577|MEDICINE|epigastric pain;vomiting;pain radiating to the back|
hydromorphone 0.5/1 mg Q4H:PRN;ondansetron 4/8 mg Q8H:PRN;lactated Ringer's 1/2 L IV|
lipase;Lipase;420;6800;0;U/L|epigastric tenderness with guarding|
CT of the abdomen|the pancreas is edematous with peripancreatic fat stranding|
interstitial pancreatitis|endoscopic retrograde cholangiopancreatography|PRSS1

acute cholecystitis|K81|575|SURGERY|right upper quadrant pain;nausea;fever|
piperacillin-tazobactam 3.375/4.5 g Q8H;metronidazole 500 mg Q8H;acetaminophen 650/1000 mg Q6H:PRN|
alkaline phosphatase;AlkPhos;140;410;0;U/L|positive Murphy sign|
abdominal ultrasound|the gallbladder is distended with wall thickening and several stones|
acute cholecystitis|laparoscopic cholecystectomy|ABCG8

acute appendicitis|K35|540|SURGERY|periumbilical pain;anorexia;right lower quadrant pain|
cefoxitin 1/2 g Q6H;ketorolac 15/30 mg Q6H:PRN|
white blood cell count;WBC;12.1;21.9;1;K/uL|tenderness at McBurney point|
CT of the abdomen|the appendix is dilated with wall enhancement and adjacent stranding|
uncomplicated appendicitis|laparoscopic appendectomy|CXCL8

gastrointestinal bleeding|K92|578|MEDICINE|melena;hematemesis;dizziness|
pantoprazole 40/80 mg BID;octreotide 50 mcg IV|
hemoglobin;Hgb;5.4;9.1;1;g/dL|melena on rectal examination|
CT angiogram of the abdomen|no active extravasation of contrast is seen|
no active bleeding|esophagogastroduodenoscopy|VWF

iron deficiency anemia|D50|280|HEMATOLOGY|fatigue;pallor;pica;brittle nails|
ferrous sulfate 325 mg DAILY;iron sucrose 200/300 mg IV|
ferritin;Ferritn;4;14;0;ng/mL|conjunctival pallor and koilonychia|
capsule endoscopy|there are a few small bowel angioectasias|
small bowel angioectasia|colonoscopy|TMPRSS6

acute myeloid leukemia|C92|205|ONCOLOGY|easy bruising;fever;gum bleeding;fatigue|
cytarabine 100/200 mg/m2 IV;daunorubicin 60/90 mg/m2 IV;allopurinol 300 mg DAILY|
peripheral blasts;Blasts;22;91;0;%|scattered petechiae on the legs|
chest radiograph|the lungs are clear and the port is in the superior vena cava|
no acute process|bone marrow biopsy|FLT3

breast cancer|C50|174|ONCOLOGY|breast lump;nipple discharge;bone pain|
letrozole 2.5 mg DAILY;tamoxifen 20 mg DAILY;trastuzumab 6/8 mg/kg IV|
cancer antigen 15-3;CA15-3;38;240;0;U/mL|a firm mass in the upper outer quadrant of the left breast|
mammogram|there is a spiculated mass with pleomorphic calcifications in the left breast|
highly suspicious mass|sentinel lymph node biopsy|BRCA1

lung cancer|C34|162|ONCOLOGY|hemoptysis;weight loss;hoarseness;persistent cough|
carboplatin 400/550 mg IV;pemetrexed 500 mg/m2 IV;pembrolizumab 200 mg IV|
carcinoembryonic antigen;CEA;8.2;96.4;1;ng/mL|decreased breath sounds over the left upper lobe|
CT of the chest|there is a spiculated left upper lobe nodule with mediastinal adenopathy|
primary lung malignancy|endobronchial ultrasound biopsy|EGFR

prostate cancer|C61|185|UROLOGY|weak urinary stream;hematuria;bone pain|
leuprolide 7.5/22.5 mg IM;bicalutamide 50 mg DAILY;abiraterone 1000 mg DAILY|
prostate-specific antigen;PSA;9.8;180.5;1;ng/mL|a hard nodule in the right lobe of the prostate|
bone scan|there are foci of increased uptake in the lumbar spine|
osseous metastases|radical prostatectomy|HOXB13

ischemic stroke|I63|434|NEUROLOGY|facial droop;slurred speech;right arm weakness|
clopidogrel 75 mg DAILY;aspirin 81/325 mg DAILY;alteplase 50/70/90 mg IV|
low-density lipoprotein;LDLcalc;118;204;0;mg/dL|right pronator drift and expressive aphasia|
MRI of the brain|there is restricted diffusion in the left middle cerebral artery territory|
acute infarct|mechanical thrombectomy|NOTCH3

epilepsy|G40|345|NEUROLOGY|convulsions;staring spells;postictal confusion|
levetiracetam 500/1000/1500 mg BID;lamotrigine 25/100 mg BID;valproic acid 250/500 mg TID|
serum lactate;Lactate;3.1;9.4;1;mmol/L|a lateral tongue laceration|
MRI of the brain|there is increased signal in the left hippocampus with volume loss|
mesial temporal sclerosis|continuous electroencephalography|SCN1A

Parkinson disease|G20|332|NEUROLOGY|resting tremor;slow gait;micrographia;falls|
carbidopa-levodopa 25/50 mg TID;pramipexole 0.125/0.5 mg TID;rasagiline 0.5/1 mg DAILY|
serum vitamin B12;VitB12;310;720;0;pg/mL|cogwheel rigidity and masked facies|
dopamine transporter scan|there is reduced uptake in both putamina|
presynaptic dopaminergic deficit|deep brain stimulator placement|LRRK2

multiple sclerosis|G35|340|NEUROLOGY|optic pain;leg numbness;gait imbalance;fatigue|
methylprednisolone 1 g IV;dimethyl fumarate 120/240 mg BID;baclofen 5/10/20 mg TID|
cerebrospinal fluid protein;TotProt;52;98;0;mg/dL|
afferent pupillary defect and internuclear ophthalmoplegia|
MRI of the brain|there are periventricular white matter lesions with contrast enhancement|
active demyelination|lumbar puncture|HLA-DRB1

bacterial meningitis|G00|320|NEUROLOGY|neck stiffness;headache;photophobia;fever|
ceftriaxone 2 g Q12H;vancomycin 1/1.25 g Q12H;dexamethasone 8/10 mg Q6H|
cerebrospinal fluid neutrophils;Polys;82;97;0;%|positive Kernig and Brudzinski signs|
CT of the head|no mass effect or hemorrhage is seen|
no contraindication to lumbar puncture|lumbar puncture|TLR4

sepsis|A41|038|MICU|fever;rigors;confusion;hypotension|
vancomycin 1/1.25 g Q12H;cefepime 1/2 g Q8H;norepinephrine 0.05/0.12 mcg/kg/min IV|
serum lactate;Lactate;2.6;11.8;1;mmol/L|warm extremities with bounding pulses|
CT of the abdomen|no drainable collection is seen|no abscess|central venous catheter placement|TNF

urinary tract infection|N39|599|MEDICINE|dysuria;urinary frequency;suprapubic pain|
nitrofurantoin 100 mg BID;ciprofloxacin 250/500 mg BID;ceftriaxone 1 g Q24H|
urine white cells;UrWBC;28;182;0;#/hpf|suprapubic tenderness|
renal ultrasound|the bladder wall is mildly thickened without hydronephrosis|
cystitis|urinary catheter exchange|UMOD

cellulitis|L03|682|MEDICINE|leg redness;warmth;leg swelling;fever|
cephalexin 250/500 mg Q6H;vancomycin 1/1.25 g Q12H;clindamycin 300/450 mg Q8H|
C-reactive protein;CRP;48;214;0;mg/L|spreading erythema of the left shin|
lower extremity ultrasound|there is no deep vein thrombosis and there is subcutaneous edema|
no deep vein thrombosis|incision and drainage|CRP

rheumatoid arthritis|M05|714|RHEUMATOLOGY|morning stiffness;joint swelling;hand pain|
methotrexate 10/15/20 mg weekly;adalimumab 40 mg SC;hydroxychloroquine 200/400 mg DAILY|
rheumatoid factor;RhFacto;42;388;0;IU/mL|synovitis of the metacarpophalangeal joints|
hand radiograph|there are marginal erosions of the metacarpal heads|
erosive arthropathy|knee arthrocentesis|PTPN22

gout|M10|274|RHEUMATOLOGY|big toe pain;joint redness;joint swelling|
colchicine 0.6/1.2 mg DAILY;allopurinol 100/300 mg DAILY;indomethacin 25/50 mg TID|
uric acid;UricAcd;8.1;13.2;1;mg/dL|an exquisitely tender first metatarsophalangeal joint|
foot radiograph|there are punched-out erosions with overhanging edges|
chronic gouty arthropathy|knee arthrocentesis|SLC2A9

systemic lupus erythematosus|M32|710|RHEUMATOLOGY|
malar rash;joint pain;photosensitivity;oral ulcers|
hydroxychloroquine 200/400 mg DAILY;mycophenolate 500/1000 mg BID;prednisone 10/20/60 mg DAILY|
complement C3;C3;31;74;0;mg/dL|a malar rash that spares the nasolabial folds|
renal ultrasound|the kidneys are mildly echogenic|
nonspecific renal parenchymal disease|renal biopsy|IRF5

hip fracture|S72|820|ORTHOPAEDICS|hip pain;inability to bear weight;fall from standing|
oxycodone 2.5/5 mg Q4H:PRN;enoxaparin 30/40 mg DAILY;acetaminophen 650/1000 mg TID|
hematocrit;Hct;24.1;33.9;1;%|a shortened and externally rotated left leg|
pelvis radiograph|there is a displaced fracture of the left femoral neck|
left femoral neck fracture|hip hemiarthroplasty|COL1A1

major depressive disorder|F33|296|PSYCHIATRY|low mood;insomnia;anhedonia;poor concentration|
sertraline 50/100/150 mg DAILY;mirtazapine 7.5/15 mg QHS;bupropion 150/300 mg DAILY|
25-hydroxyvitamin D;VitD;11;27;0;ng/mL|psychomotor slowing with a blunted affect|
CT of the head|no intracranial abnormality is seen|normal study|electroconvulsive therapy|SLC6A4

schizophrenia|F20|295|PSYCHIATRY|auditory hallucinations;paranoia;disorganized speech|
olanzapine 5/10/20 mg QHS;risperidone 1/2/4 mg BID;clozapine 100/200 mg BID|
serum prolactin;Prolact;31;112;0;ng/mL|responding to internal stimuli|
CT of the head|no mass or hemorrhage is seen|normal study|long-acting injection|DRD2

myocardial infarction|I21|410|CARDIOLOGY|crushing chest pain;diaphoresis;left arm pain;nausea|
aspirin 81/325 mg DAILY;ticagrelor 90 mg BID;atorvastatin 40/80 mg QHS|
cardiac troponin T;cTropnT;0.18;6.4;2;ng/mL|diaphoresis with a new fourth heart sound|
coronary angiogram|there is a thrombotic occlusion of the proximal left anterior descending artery|
occluded left anterior descending artery|percutaneous coronary intervention|PCSK9

hypertension|I10|401|MEDICINE|headache;blurred vision;no symptoms|
lisinopril 5/10/40 mg DAILY;amlodipine 2.5/5/10 mg DAILY;chlorthalidone 12.5/25 mg DAILY|
serum potassium;K;3.2;4.9;1;mmol/L|a loud aortic second sound|
transthoracic echocardiogram|there is concentric left ventricular hypertrophy|
left ventricular hypertrophy|ambulatory blood pressure monitoring|AGT

Clostridioides difficile infection|A04|008|MEDICINE|watery diarrhea;abdominal cramps;fever|
oral vancomycin 125/250 mg Q6H;fidaxomicin 200 mg BID|
white blood cell count;WBC;14.2;33.7;1;K/uL|a diffusely tender and distended abdomen|
CT of the abdomen|there is diffuse colonic wall thickening|
pancolitis|fecal microbiota transplantation|CXCL5

Ménière disease|H81|386|MEDICINE|vertigo;tinnitus;fluctuating hearing loss;ear fullness|
meclizine 12.5/25 mg TID:PRN;triamterene-hydrochlorothiazide 37.5 mg DAILY|
low-frequency hearing threshold;PTA;34;71;0;dB|horizontal nystagmus beating to the right|
MRI of the internal auditory canals|no retrocochlear mass is seen|
normal internal auditory canals|intratympanic injection|COCH

sickle cell disease|D57|282|HEMATOLOGY|bone pain;chest pain;jaundice|
hydroxyurea 500/1000 mg DAILY;folic acid 1 mg DAILY;morphine 2/4 mg Q3H:PRN|
lactate dehydrogenase;LD(LDH);380;1150;0;U/L|scleral icterus and a flow murmur|
chest radiograph|there is a new left lower lobe opacity with bony changes of the ribs|
acute chest syndrome|exchange transfusion|HBB
"""


def _condition(block: str) -> Condition:
    fields = "".join(block.splitlines()).split("|")
    name, icd10, icd9, service, symptoms, drugs, lab, *rest = fields
    long_name, short_name, lowest, highest, decimals, unit = lab.split(";")
    exam, study, finding, impression, procedure, marker = rest
    return Condition(
        name=name,
        icd10=icd10,
        icd9=icd9,
        service=service,
        symptoms=tuple(symptoms.split(";")),
        drugs=tuple(_drug(drug) for drug in drugs.split(";")),
        lab=(long_name, short_name, float(lowest), float(highest), int(decimals), unit),
        exam=exam,
        study=study,
        finding=finding,
        impression=impression,
        procedure=procedure,
        marker=marker,
    )


def _drug(words: str) -> tuple[str, tuple[str, ...], str, str]:
    """`insulin glargine 10/18 units QHS` as (name, doses, unit, frequency)."""
    *name, doses, unit, frequency = words.split()
    return " ".join(name), tuple(doses.split("/")), unit, frequency


CONDITIONS = tuple(_condition(block) for block in _FIELDS.strip().split("\n\n"))
