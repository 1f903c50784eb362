// What was dropped or chosen, as a flat list of {file, name}; of folders their pictures with their paths inside.

const PICTURE = /\.(jpe?g|png|tiff?|bmp|webp|dcm|dicom)$/i;

// A folder may hold tables, notes and hidden files: those are left aside. A file dropped by itself is always tried.
const isPicture = (name) => PICTURE.test(name) && !name.split("/").pop().startsWith(".");

const byName = new Intl.Collator(undefined, { numeric: true });

function sorted(found) {
  return found.sort((a, b) => byName.compare(a.name, b.name));
}

// {taken: [{file, name}], left: how many files of folders are no pictures}
export function chosen(list) {
  const all = [...list].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
  const taken = all.filter(({ file, name }) => !file.webkitRelativePath || isPicture(name));
  return { taken: sorted(taken), left: all.length - taken.length };
}

export async function dropped(transfer) {
  // The entries must be taken before anything is awaited: the transfer is emptied then.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return chosen(transfer.files);
  const taken = [];
  let left = 0;
  const walk = async (entry, inside) => {
    if (entry.isDirectory) {
      for (const child of await children(entry)) await walk(child, true);
    } else {
      const name = entry.fullPath.replace(/^\//, "");
      if (inside && !isPicture(name)) left += 1;
      else taken.push({ file: await new Promise((done, fail) => entry.file(done, fail)), name });
    }
  };
  for (const entry of entries) await walk(entry, false);
  return { taken: sorted(taken), left };
}

async function children(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    // A reader gives a hundred at a time.
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return found;
    found.push(...some);
  }
}
