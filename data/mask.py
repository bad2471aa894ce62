"""Replace email addresses, phone numbers and IP addresses, for data.clean --mask.

    text, counts = mask(text, ('email', 'phone', 'ip'))

Patterns favour precision. Every search is bounded, so time is linear in the text. These stay:
    version numbers, sections and loopback addresses among IP addresses,
    dates, ISBNs, prices and plain numbers among phone numbers.
Phone numbers have a country code ("+44 20 7946 0958"), the North American form ("(555) 123-4567"),
a leading zero and two to five groups ("030 12345678"), or a word before them ("tel. 12345678").
"""

import ipaddress
import re

MASKS = {'email': '|||EMAIL_ADDRESS|||', 'ip': '|||IP_ADDRESS|||', 'phone': '|||PHONE_NUMBER|||'}

# lengths of RFC 5321 and RFC 1035; letters of all scripts
EMAIL = re.compile(r'(?<![\w.+%@-])[\w+%-][\w.+%-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}'
                   r'[^\W\d_]{2,24}(?![\w@-])')
IPV4 = re.compile(r'(?<![\w.:+-])(?<!\w/)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)', re.A)
IPV6 = re.compile(r'(?<![\w.:])(?:[0-9a-f]{1,4}|:):(?:[0-9a-f]{0,4}:){0,7}'
                  r'(?:[0-9a-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\w)', re.I | re.A)
VERSION = re.compile(r'(?:\b(?:version|ver|release|section|chapter|build|firmware|clause|v)\b'
                     r'\.?|§)[\s:=]{0,2}$', re.I)

# ITU-T E.164: zones 1 and 7, and the codes of two and of three digits
COUNTRY = (r'(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|'
           r'(?:2[1-689]|3[578]|42|5[09]|6[789]|8[0578]|9[679])\d)')
PHONE = re.compile(rf'''(?<![\w.,+#/=$€£-])(?:
    (?:\+|00){COUNTRY}(?:[ .\-/]{{0,2}}\(?\d{{1,8}}\)?){{1,6}}  # +44 (0)20 7946 0958
    | (?:1[-. ])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[-.])\d{{3}}[-.]\d{{4}}         # (555) 123-4567
    | (?<!\d[ ])\(?0[1-9]\d{{1,3}}\)?(?:[ /]|[ ]?-[ ]?)\d{{3,4}}[ -]?\d{{3,5}}  # 020 7946 0958
    | 0[1-9](?:([ .-])\d\d)(?:\1\d\d){{3}}                               # 01 23 45 67 89
    )(?![\w+=-]|[.,/]\d)''', re.X | re.A)
LABELLED = re.compile(r'''\b((?:tel|phone|telephone|mobile|cell|fax|call|whatsapp|telefon|handy|
    téléphone|teléfono|tél|mobil)(?:[ ](?:no|nr|number))?[.:]{0,2}[ ]{0,2})
    (\(?\d{1,6}\)?(?:[ .\-/]?\(?\d{1,8}\)?){1,5})(?![\w-]|[.,/]\d)''', re.X | re.I)
DATE = re.compile(r'[( ]*(?:(?:19|20)\d\d[-./ ][01]?\d[-./ ][0-3]?\d|'
                  r'[0-3]?\d[-./ ][01]?\d[-./ ](?:19|20)\d\d)[) ]*')


def mask(text: str, kinds) -> tuple[str, dict[str, int]]:
    """Replace what the kinds name; -> the text, and the count of each kind that occurs."""
    counts = {}
    for kind in MASKS:  # emails first: their domains may hold an address
        if kind not in kinds:
            continue
        n_before = text.count(MASKS[kind])
        for pattern, replace in REPLACE[kind]:
            text = pattern.sub(replace, text)
        if count := text.count(MASKS[kind]) - n_before:
            counts[kind] = count
    return text, counts


def mask_email(match) -> str:
    return match[0] if '..' in match[0] or '.@' in match[0] else MASKS['email']


def mask_ip(match) -> str:
    """Mask an address unless it is invalid, of this machine, or like a version."""
    address = match[0]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    before = match.string[max(0, match.start() - 12):match.start()]
    is_plain = (len(address) == 7 or VERSION.search(before) if parsed.version == 4 else
                # C++ and Perl write names such as "dead::beef"
                not (0x2000 <= (first := int(parsed) >> 112) <= 0x3fff or first >= 0xfc00
                     or parsed.ipv4_mapped or first == 0x64))
    return address if is_plain or parsed.is_loopback or parsed.is_unspecified else MASKS['ip']


def mask_phone(match) -> str:
    """Mask a number of 7 to 15 digits. The pattern decides the rest."""
    number = match[0]
    n_digits = sum(map(str.isdigit, number))
    least = 8 if number[0] == '+' else 9
    # not +35236450.6
    has_groups = re.search(r'\d\D+\d\d+$' if '.' in number else r'^\+|\d\D+\d', number)
    return MASKS['phone'] if least <= n_digits <= 15 and has_groups else number


def mask_labelled(match) -> str:
    label, number = match.groups()
    is_number = 7 <= sum(map(str.isdigit, number)) <= 15 and not DATE.fullmatch(number)
    return label + MASKS['phone'] if is_number else match[0]


REPLACE = {'email': [(EMAIL, mask_email)], 'ip': [(IPV4, mask_ip), (IPV6, mask_ip)],
           'phone': [(PHONE, mask_phone), (LABELLED, mask_labelled)]}
